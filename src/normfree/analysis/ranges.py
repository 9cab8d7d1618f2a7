"""Heads per range of entropy, pooled over the seeds of each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from normfree.analysis.entropy import NORMALISERS, RangeCounts, normaliser_maxima, range_counts, trained_heads
from normfree.analysis.groups import Group


@dataclass(frozen=True)
class PooledRanges:
    """The heads of all measured seeds of one group under one normaliser."""

    counts: RangeCounts
    maximum_nats: float
    """What counts as 1: the mean over layers."""
    seeds: int


def pooled_ranges(groups: Sequence[Group]) -> dict[str, dict[str, PooledRanges]]:
    """`{normaliser: {group: ranges}}` for all groups with a run that was measured after training.

    The last probe of a run that diverged is left out: the less a model is trained, the nearer its heads are to uniform.
    Empty when nothing was measured. Under `observed` all groups share one maximum.
    """
    measured = [(g, run, heads) for g in groups for run in g.runs if (heads := trained_heads(run)) is not None]
    contexts = [run.spec["data"]["context"] for _, run, _ in measured]
    pooled: dict[str, dict[str, PooledRanges]] = {}
    for normaliser in NORMALISERS if measured else ():
        maxima = normaliser_maxima(normaliser, [heads for *_, heads in measured], contexts)
        found: dict[str, list[tuple[RangeCounts, float]]] = {}
        for (group, _, heads), maximum_L in zip(measured, maxima, strict=True):
            counted = range_counts(heads.entropy_LH, maximum_L)
            found.setdefault(group.name, []).append((counted, float(maximum_L.mean())))
        pooled[normaliser] = {
            name: PooledRanges(reduce(add, (counts for counts, _ in seeds)), seeds[-1][1], len(seeds))
            for name, seeds in found.items()
        }
    return pooled
