"""Perplexity against communication, over the variants of a study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normfree.cost.totals import gigabytes, of_run
from normfree.records import Run
from normfree.tables import Column, Table


@dataclass(frozen=True)
class Point:
    """One variant."""

    label: str
    perplexity: float
    """Mean over seeds; NaN when any run of the variant has none."""
    seeds: int
    bytes: float
    rounds: int
    on_front: bool


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as low in both values and lower in one. NaN is never on the front."""

    def beats(other: tuple[float, float], point: tuple[float, float]) -> bool:
        return other != point and other[0] <= point[0] and other[1] <= point[1]

    return [not any(map(math.isnan, p)) and not any(beats(other, p) for other in points) for p in points]


def trade_off(runs: Iterable[Run], *, protocol: str = "cheetah") -> list[Point]:
    """One point per label and cost, cheapest first."""
    groups: dict[tuple[str, float, int], list[float]] = {}
    for run in runs:
        cost = of_run(run, protocol=protocol)
        groups.setdefault((run.label, cost.bytes, cost.rounds), []).append(run.perplexity)
    values = {key: sum(found) / len(found) for key, found in groups.items()}
    front = pareto_front([(perplexity, key[1]) for key, perplexity in values.items()])
    points = [
        Point(label, values[label, sent, rounds], len(groups[label, sent, rounds]), sent, rounds, best)
        for (label, sent, rounds), best in zip(groups, front, strict=True)
    ]
    return sorted(points, key=lambda point: (point.bytes, point.label))


def trade_off_table(points: Iterable[Point], *, protocol: str = "cheetah") -> Table:
    """One row per point; the Pareto front is marked in words."""
    columns = (Column("Variant", numeric=False), *map(Column, ("Perplexity", "n", "GB", "Rounds")))
    rows = tuple(
        (
            point.label,
            f"{point.perplexity:.2f}" if math.isfinite(point.perplexity) else "NaN",
            f"{point.seeds}",
            gigabytes(point.bytes),
            f"{point.rounds}",
            "yes" if point.on_front else "no",
        )
        for point in points
    )
    notes = ("Pareto front: no other variant has both a lower or equal perplexity and fewer or as many bytes.",)
    caption = f"Perplexity against communication in private inference ({protocol})"
    return Table("perplexity-communication", caption, (*columns, Column("Pareto front", numeric=False)), rows, notes)
