"""Perplexity against communication, over the variants of a study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normfree.analysis.groups import Group, perplexities_on_common_seeds
from normfree.cost.families import NoPriceError
from normfree.cost.totals import of_run


@dataclass(frozen=True)
class Point:
    """One group of runs."""

    name: str
    """The group's."""
    corpus: str
    """Fingerprint of its text."""
    perplexity: float
    """Mean over the seeds that all rivals have (over its own where none is common); NaN when any run has none."""
    seeds: int
    bytes: float
    rounds: int
    on_front: bool


@dataclass(frozen=True)
class TradeOff:
    """The groups of a report in the plane of perplexity and bytes of CHEETAH."""

    points: tuple[Point, ...]
    """Cheapest first."""
    unpriced: tuple[str, ...]
    """Groups with an operation that has no price: they are not free, so they have no point."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as low in both values and lower in one. NaN is never on the front."""

    def beats(other: tuple[float, float], point: tuple[float, float]) -> bool:
        return other != point and other[0] <= point[0] and other[1] <= point[1]

    return [not any(map(math.isnan, p)) and not any(beats(other, p) for other in points) for p in points]


def trade_off(groups: Iterable[Group]) -> TradeOff:
    """One point per group that has a result; groups without a price are named and cost nothing else.

    Each corpus has a Pareto front of its own: perplexities on other text, tokens or lengths are no rivals.
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
        found = perplexities_on_common_seeds([group for group, _ in rivals])
        front = pareto_front([(found[group.name].mean, cost.bytes) for group, cost in rivals])
        points += [
            Point(group.name, corpus, found[group.name].mean, found[group.name].n, cost.bytes, cost.rounds, best)
            for (group, cost), best in zip(rivals, front, strict=True)
        ]
    return TradeOff(tuple(sorted(points, key=lambda point: (point.bytes, point.name))), tuple(unpriced))
