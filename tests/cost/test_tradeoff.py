"""Perplexity against communication."""

from __future__ import annotations

import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from normfree.cost import pareto_front, trade_off, trade_off_table
from tests.synthetic import study, write_run

POINTS = st.lists(st.tuples(st.integers(0, 5).map(float), st.integers(0, 5).map(float)), max_size=12)


def test_front_by_hand() -> None:
    points = [(3.0, 9.0), (2.9, 25.0), (3.2, 7.0), (3.3, 7.0), (3.2, 23.0), (math.nan, 1.0)]
    assert pareto_front(points) == [True, True, True, False, False, False]


def test_equal_points_share_the_front() -> None:
    assert pareto_front([(1.0, 2.0), (1.0, 2.0)]) == [True, True]


@given(POINTS)
def test_whatever_is_off_the_front_is_beaten_by_a_point_on_it(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    kept = [point for point, on_front in zip(points, front, strict=True) if on_front]
    for point, on_front in zip(points, front, strict=True):
        assert on_front != any(best != point and best[0] <= point[0] and best[1] <= point[1] for best in kept)


def test_a_study_becomes_points_cheapest_first(tmp_path: Path) -> None:
    points = {point.label: point for point in trade_off(study(tmp_path))}
    assert next(iter(points)) == "SM"
    assert points["SM+R"].bytes < points["SM+LN+R"].bytes < points["SM+G"].bytes < points["SM+LN+G"].bytes
    assert points["SM+R"].seeds == 3
    assert points["SM+R"].on_front
    assert math.isnan(points["SM"].perplexity)  # one of its seeds diverged
    assert not points["SM"].on_front


def test_table_marks_the_front_in_words(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, label) for label in ("SM+LN+G", "SM+G", "SM+R")]
    table = trade_off_table(trade_off(runs))
    assert {row[0]: row[-1] for row in table.rows} == {"SM+R": "yes", "SM+G": "no", "SM+LN+G": "yes"}
