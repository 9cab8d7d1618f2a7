"""Perplexity against communication."""

from __future__ import annotations

import math
from pathlib import Path

from normfree.analysis.groups import group_runs
from normfree.cost.totals import Point, pareto_front, trade_off
from normfree.report.tables.cost import trade_off_table
from normfree.store.runs import Run
from tests.synthetic import study, write_run


def points_of(runs: list[Run], *, mix: bool = False) -> list[Point]:
    return trade_off(group_runs(runs, mix=mix))[0]


def test_front_by_hand() -> None:
    points = [(3.0, 9.0), (2.9, 25.0), (3.2, 7.0), (3.2, 7.0), (3.3, 7.0), (3.2, 23.0), (math.nan, 1.0)]
    assert pareto_front(points) == [True, True, True, True, False, False, False]


def test_a_study_becomes_points_cheapest_first(tmp_path: Path) -> None:
    points = {point.name: point for point in points_of(study(tmp_path))}
    assert next(iter(points)) == "SM"
    assert points["SM+R"].bytes < points["SM+LN+R"].bytes < points["SM+G"].bytes < points["SM+LN+G"].bytes
    assert points["SM+R"].seeds == 1
    assert points["SM+R"].on_front
    assert math.isnan(points["SM"].perplexity)  # one of its seeds diverged
    assert not points["SM"].on_front


def test_variants_are_compared_on_common_seeds(tmp_path: Path) -> None:
    """Fewer and luckier seeds put no variant onto the front."""
    runs = [write_run(tmp_path, "SM+R", seed=seed, perplexity=ppl) for seed, ppl in enumerate((34.0, 33.0, 32.0))]
    runs += [write_run(tmp_path, "SM+G", seed=0, perplexity=33.5)]
    points = {point.name: point for point in points_of(runs)}
    values = {name: (point.perplexity, point.seeds) for name, point in points.items()}
    assert values == {"SM+R": (34.0, 1), "SM+G": (33.5, 1)}
    assert points["SM+G"].on_front


def test_the_order_of_operations_changes_no_bit(tmp_path: Path) -> None:
    """ReLU in one half and GELU in the other: only the better of the two hybrids is on the front."""
    layers = {"num_hidden_layers": 12}
    halves = {"SM+R/G": ["relu"] * 6 + ["gelu"] * 6, "SM+G/R": ["gelu"] * 6 + ["relu"] * 6}
    runs = [
        write_run(tmp_path, label, perplexity=ppl, model={**layers, "norm": "none", "activation": halves[label]})
        for label, ppl in (("SM+R/G", 32.0), ("SM+G/R", 34.0))
    ]
    better, worse = sorted(points_of(runs), key=lambda point: point.perplexity)
    assert better.bytes == worse.bytes
    assert (better.on_front, worse.on_front) == (True, False)


def test_each_corpus_has_a_front_of_its_own(tmp_path: Path) -> None:
    other = {"corpus": {"fingerprint": "decaf" * 8, "unigram_perplexity": 9.0, "vocab_size": 2048}}
    runs = [write_run(tmp_path, "SM+R", perplexity=34.0)]
    runs += [write_run(tmp_path, "SM+R", study="other", perplexity=3.0, facts=other)]
    assert [point.on_front for point in points_of(runs, mix=True)] == [True, True]


def test_a_group_without_a_price_has_no_point(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, label) for label in ("SM+LN+G", "SM+G", "SM+R")]
    runs.append(write_run(tmp_path, "SM+R2", model={"activation": "squared_relu"}))
    table = trade_off_table(group_runs(runs))
    assert {row[0]: row[-1] for row in table.rows} == {"SM+R": "yes", "SM+G": "no", "SM+LN+G": "yes"}
    assert "SM+R2 is left out: an operation of it has no price." in table.notes
