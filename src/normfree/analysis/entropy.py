"""Head entropies against the most a head can have, and how many heads lie in which quarter of it.

L layers, H heads, R ranges (four quarters)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normfree.store.runs import Run

Floats = NDArray[np.float64]

RANGES = ("[0, 1/4)", "[1/4, 1/2)", "[1/2, 3/4)", "[3/4, 1]")
NORMALISERS = {
    "observed": "the highest entropy of any head of any run compared here (the paper's Max)",
    "log_t": "ln T, which only the last row of a causal matrix can reach",
    "causal": "ln(T!)/T, the mean over rows of the most a causal row can have",
}


@dataclass(frozen=True)
class Heads:
    """The entropies of every head of one run at one step."""

    entropy_LH: Floats
    """Nats; NaN for a head whose rows were not finite."""
    ceiling_L: Floats
    """Nats a head of that layer would have if every row were uniform over what it may see."""
    step: int
    split: str
    """`final` for the large sample after training, `probe` for the fixed batch while training."""


@dataclass(frozen=True)
class RangeCounts:
    """How many heads lie in each quarter; heads without a finite entropy are in none of them."""

    finite_R: tuple[int, int, int, int]
    nonfinite: int

    @property
    def heads(self) -> int:
        return sum(self.finite_R) + self.nonfinite

    @property
    def shares(self) -> list[float]:
        """Shares of all heads; they sum to 1 only when every head is finite."""
        return [count / self.heads for count in self.finite_R]

    def __add__(self, other: RangeCounts) -> RangeCounts:
        first, second, third, fourth = (a + b for a, b in zip(self.finite_R, other.finite_R, strict=True))
        return RangeCounts((first, second, third, fourth), self.nonfinite + other.nonfinite)


def causal_ceiling(context: int) -> float:
    """Nats of a head that spreads evenly over all it may see: mean of ln i for i = 1..T, that is ln(T!)/T."""
    if context < 1:
        raise ValueError(f"context={context}: give the number of tokens in a block, 1 or more")
    return math.lgamma(context + 1) / context


def range_counts(entropy_LH: ArrayLike, maximum: ArrayLike) -> RangeCounts:
    """Count heads per quarter of `maximum` (nats; one number, or one a layer).

    A quarter holds its lower edge; the last one holds its upper edge too, and what rounding puts above it. A head of 0
    nats is in the first one, whatever the maximum.
    """
    entropy_LH = np.asarray(entropy_LH, dtype=float)
    maximum_L1 = np.broadcast_to(np.asarray(maximum, dtype=float), entropy_LH.shape[:1])[:, None]
    finite_LH = np.isfinite(entropy_LH)
    share_LH = np.divide(entropy_LH, maximum_L1, out=np.zeros_like(entropy_LH), where=entropy_LH != 0)
    quarter = np.floor(4 * share_LH[finite_LH]).clip(0, 3).astype(int)
    first, second, third, fourth = np.bincount(quarter, minlength=4).tolist()
    return RangeCounts((first, second, third, fourth), int((~finite_LH).sum()))


def layer_means(values: ArrayLike) -> Floats:
    """One number a layer: the mean over its heads, where there are heads. A layer with a non-finite head has none:
    NaN."""
    values = np.atleast_1d(np.asarray(values, dtype=float))
    return values.mean(axis=1) if values.ndim == 2 else values


def shares_of_ceiling(heads: Heads) -> Floats:
    """Entropy of every head as a share of its layer's causal ceiling, [L, H]."""
    return heads.entropy_LH / heads.ceiling_L[:, None]


def top_quarter_share(heads: Heads | None) -> float:
    """Share of the heads at or above 3/4 of their ceiling; NaN where one is not finite, or nothing was measured."""
    if heads is None:
        return math.nan
    counts = range_counts(heads.entropy_LH, heads.ceiling_L)
    return math.nan if counts.nonfinite else counts.shares[-1]


def normaliser_maxima(name: str, compared: Sequence[Heads], contexts: Sequence[int]) -> list[Floats]:
    """What counts as 1 for each of the compared models under one of `NORMALISERS`: nats, [L] a model.

    `contexts` are the block lengths T of the same models. Under `observed` the answer depends on which
    models are compared; it is NaN when none has a finite head.
    """
    if name not in NORMALISERS:
        raise ValueError(f"normaliser {name!r}; allowed: {', '.join(NORMALISERS)}")
    if name == "causal":
        return [heads.ceiling_L for heads in compared]
    if name == "log_t":
        return [np.full(len(h.ceiling_L), math.log(t)) for h, t in zip(compared, contexts, strict=True)]
    finite = [value for heads in compared for value in heads.entropy_LH.ravel() if math.isfinite(value)]
    return [np.full(len(heads.ceiling_L), max(finite, default=math.nan)) for heads in compared]


def probed_heads(run: Run) -> list[Heads]:
    """The entropies of every probe of a run, oldest first."""
    return _heads(run, "probe")


def final_heads(run: Run) -> Heads | None:
    """The entropies measured after training; failing that the newest probe; None when never measured."""
    found = _heads(run, "final") or probed_heads(run)
    return found[-1] if found else None


def trained_heads(run: Run) -> Heads | None:
    """The entropies after training; None for a run that did not finish, or was not measured then."""
    found = _heads(run, "final") if run.status == "finished" else []
    return found[-1] if found else None


def _heads(run: Run, split: str) -> list[Heads]:
    ceilings = dict(run.series(split, "ceiling_nats"))
    fallback = causal_ceiling(run.spec["data"]["context"])
    found = []
    for step, value in run.series(split, "entropy_nats"):
        entropy_LH = np.array(value, dtype=float)
        ceiling_L = np.array(ceilings.get(step, [fallback] * len(entropy_LH)), dtype=float)
        ceiling_L[np.isnan(ceiling_L)] = fallback  # a layer without a finite row: its ceiling was not measured
        found.append(Heads(entropy_LH, ceiling_L, step, split))
    return found
