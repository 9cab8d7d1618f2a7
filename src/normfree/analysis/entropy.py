"""Head entropies and their ceiling.  L layers, H heads"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normfree.store.runs import Run

Floats = NDArray[np.float64]

OVERLOAD_SHARE = 0.75
"""A head at or above this share of the causal ceiling is nearly uniform."""


@dataclass(frozen=True)
class Heads:
    """The entropies of every head of one run at one step."""

    entropy_LH: Floats
    """Nats; NaN for a head with non-finite rows."""
    ceiling_L: Floats
    """Entropy in nats of a head that attends uniformly to every visible token."""
    step: int


def causal_ceiling(context: int) -> float:
    """Entropy of a uniform causal head: the mean of ln i for i = 1..T, which is ln(T!)/T."""
    if context < 1:
        raise ValueError(f"context={context} must be 1 or more")
    return math.lgamma(context + 1) / context


def layer_means(values: ArrayLike) -> Floats:
    """One number per layer: the mean over its heads if it has heads, NaN if one of them is not finite."""
    values = np.atleast_1d(np.asarray(values, dtype=float))
    return values.mean(axis=1) if values.ndim == 2 else values


def shares_of_ceiling(heads: Heads) -> Floats:
    """Entropy of every head as a share of its layer's causal ceiling, [L, H]."""
    return heads.entropy_LH / heads.ceiling_L[:, None]


def top_quarter_share(heads: Heads | None) -> float:
    """Share of heads that are nearly uniform; NaN if a head is not finite or nothing was measured."""
    if heads is None or not np.isfinite(heads.entropy_LH).all():
        return math.nan
    return float((shares_of_ceiling(heads) >= OVERLOAD_SHARE).mean())


def probed_heads(run: Run, split: str = "probe") -> list[Heads]:
    """The entropies of every probe of a run, oldest first; `final` is the large sample after training."""
    ceilings = dict(run.series(split, "ceiling_nats"))
    heads = []
    for step, value in run.series(split, "entropy_nats"):
        ceiling_L = np.array(ceilings[step], dtype=float)
        ceiling_L[np.isnan(ceiling_L)] = causal_ceiling(run.spec["data"]["context"])  # no finite row in this layer
        heads.append(Heads(np.array(value, dtype=float), ceiling_L, step))
    return heads


def final_heads(run: Run) -> Heads | None:
    """The entropies after training, else those of the newest probe, else None."""
    heads = probed_heads(run, "final") or probed_heads(run)
    return heads[-1] if heads else None


def trained_heads(run: Run) -> Heads | None:
    """The entropies after training; None for a run that did not finish or was not measured then."""
    heads = probed_heads(run, "final") if run.status == "finished" else []
    return heads[-1] if heads else None
