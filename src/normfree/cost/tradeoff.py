"""Perplexity against communication, over the variants of a study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normfree.analysis.groups import Group, scores_on_common_seeds
from normfree.cost.families import NoPriceError
from normfree.cost.totals import of_run


@dataclass(frozen=True)
class Point:
    """Perplexity and cost of one group of runs."""

    name: str
    corpus: str  # fingerprint of its text
    perplexity: float  # mean over the seeds that all groups on its corpus have, else its own; NaN if a run has none
    seeds: int
    bytes: float
    rounds: int
    on_front: bool


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as low in both values and lower in one. NaN is never on the front."""
    return [
        not any(map(math.isnan, p)) and not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points)
        for p in points
    ]


def trade_off(groups: Iterable[Group]) -> tuple[list[Point], list[str]]:
    """One point per group that has a result and a price, cheapest first, and the names of groups without a price.

    Each corpus has its own Pareto front, because perplexities on different text cannot be compared.
    """
    priced, unpriced = [], []
    for group in groups:
        if not group.runs:
            continue
        try:
            priced.append((group, of_run(group.runs[0])))
        except NoPriceError:
            unpriced.append(group.name)
    points = []
    for corpus in dict.fromkeys(group.runs[0].corpus for group, _ in priced):
        rivals = [(group, cost) for group, cost in priced if group.runs[0].corpus == corpus]
        cells = scores_on_common_seeds([group for group, _ in rivals])
        front = pareto_front([(cells[group.name].mean, cost.bytes) for group, cost in rivals])
        points += [
            Point(group.name, corpus, cells[group.name].mean, cells[group.name].n, cost.bytes, cost.rounds, on_front)
            for (group, cost), on_front in zip(rivals, front, strict=True)
        ]
    return sorted(points, key=lambda point: (point.bytes, point.name)), unpriced
