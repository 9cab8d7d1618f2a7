"""Heads per quarter of a maximum entropy, pooled over the seeds of each group.  L layers, H heads, R ranges"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from normfree.analysis.entropy import Floats, Heads, trained_heads
from normfree.analysis.groups import Group
from normfree.store.runs import Run

RANGES = ("[0, 1/4)", "[1/4, 1/2)", "[1/2, 3/4)", "[3/4, 1]")
NORMALISERS = {
    "observed": "the highest entropy measured here (the paper's Max)",
    "log_t": "ln T, which only the last row of a causal matrix can reach",
    "causal": "ln(T!)/T, the entropy if every token looked equally at all tokens up to itself",
}


@dataclass(frozen=True)
class RangeCounts:
    """Count the heads in each quarter; heads without a finite entropy are in none."""

    finite_R: tuple[int, ...]
    nonfinite: int

    @property
    def heads(self) -> int:
        return sum(self.finite_R) + self.nonfinite

    @property
    def shares(self) -> list[float]:
        """Shares of all heads; they sum to 1 only if every head is finite."""
        return [count / self.heads for count in self.finite_R]


@dataclass(frozen=True)
class PooledRanges:
    """The heads of all measured seeds of one group under one normaliser."""

    counts: RangeCounts
    maximum_nats: float
    """The entropy that counts as 1, averaged over layers."""
    seeds: int


def range_counts(entropy_LH: ArrayLike, maximum: ArrayLike) -> RangeCounts:
    """Count heads per quarter of `maximum` in nats (one number, or one per layer).

    A quarter contains its lower edge. The last one also contains its upper edge and values that rounding puts above it.
    A head of 0 nats is in the first one, even if the maximum is 0.
    """
    entropy_LH = np.asarray(entropy_LH, dtype=float)
    maximum_L1 = np.broadcast_to(np.asarray(maximum, dtype=float), entropy_LH.shape[:1])[:, None]
    finite_LH = np.isfinite(entropy_LH)
    share_LH = np.divide(entropy_LH, maximum_L1, out=np.zeros_like(entropy_LH), where=entropy_LH != 0)
    quarter = np.floor(4 * share_LH[finite_LH]).clip(0, 3).astype(int)
    return RangeCounts(tuple(np.bincount(quarter, minlength=4).tolist()), int((~finite_LH).sum()))


def pooled_ranges(groups: Sequence[Group]) -> dict[str, dict[str, PooledRanges]]:
    """`{normaliser: {group: ranges}}` for all groups with a run that was measured after training.

    A diverged run is left out: it was trained for less time, so its heads are closer to uniform.
    Under `observed`, all groups share one maximum. Empty if nothing was measured.
    """
    measured: dict[str, list[tuple[Run, Heads]]] = {}
    for group in groups:
        if seeds := [(run, heads) for run in group.runs if (heads := trained_heads(run)) is not None]:
            measured[group.name] = seeds
    finite = [h.entropy_LH[np.isfinite(h.entropy_LH)] for seeds in measured.values() for _, h in seeds]
    observed = max((values.max() for values in finite if values.size), default=math.nan)
    pooled: dict[str, dict[str, PooledRanges]] = {}
    for normaliser in NORMALISERS if measured else ():
        pooled[normaliser] = {}
        for name, seeds in measured.items():
            maxima = [_maxima(normaliser, run, heads, observed) for run, heads in seeds]
            counts = range_counts(np.concatenate([heads.entropy_LH for _, heads in seeds]), np.concatenate(maxima))
            pooled[normaliser][name] = PooledRanges(counts, float(maxima[-1].mean()), len(seeds))
    return pooled


def _maxima(normaliser: str, run: Run, heads: Heads, observed: float) -> Floats:
    """The entropy that counts as 1 in each layer."""
    if normaliser == "causal":
        return heads.ceiling_L
    return np.full(
        len(heads.ceiling_L), observed if normaliser == "observed" else math.log(run.spec["data"]["context"])
    )
