"""The table of tasks against numpy, and its records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normfree.analysis.groups import group_runs
from normfree.analysis.seeds import student_t
from normfree.report.sections import sections_of
from normfree.report.tables.tasks import ratio, task_table, tasks_table
from normfree.store.tasks import read_tasks, write_tasks
from tests.synthetic import write_run


def record(model: Any, untrained: Any, items: str = "a", **more: Any) -> dict[str, Any]:
    values = {"model": list(model), "untrained": list(untrained)}
    return {"unit": "nats", "items_sha256": items, "values": values, **more}


def only_row(*records: dict[str, Any]) -> dict[str, str]:
    table = tasks_table({"SM+R": [{"name": of_seed} for of_seed in records]})
    return dict(zip(table.titles, table.rows[0], strict=True))


def test_scores_have_the_standard_error_of_mirrored_twos() -> None:
    random = np.random.default_rng(0)
    model, untrained = random.normal(0.5, 1, 200), random.normal(0, 1, 200)
    right, control = (100.0 * (margins > 0).reshape(-1, 2).mean(axis=1) for margins in (model, untrained))
    row = only_row(record(model, untrained))
    assert row["Score"] == f"{right.mean():.1f} +- {right.std(ddof=1) / 10:.1f}"
    difference = right - control
    mean, reach = difference.mean(), 1.96 * difference.std(ddof=1) / 10
    assert row["Less untrained"] == f"{mean:+.1f} ({mean - reach:+.1f} to {mean + reach:+.1f})"
    margins = model.reshape(-1, 2).mean(axis=1)
    assert row["Margin (nats)"] == f"{margins.mean():.3f} +- {margins.std(ddof=1) / 10:.3f}"
    both_ways = 100.0 * (margins > 0)
    assert row["Both ways (%)"] == f"{both_ways.mean():.1f} +- {both_ways.std(ddof=1) / 10:.1f}"
    assert (row["Unigram"], row["Less unigram"], row["Items"], row["Seeds"]) == ("-", "-", "200", "1")


def test_a_ratio_has_the_error_of_its_jackknife() -> None:
    random = np.random.default_rng(1)
    sizes = random.integers(20, 200, 164).astype(float)
    numbers = sizes * random.normal(2.0, 0.4, 164)
    value, error = ratio(numbers, sizes)
    assert math.isclose(value, numbers.sum() / sizes.sum())
    without = (numbers.sum() - numbers) / (sizes.sum() - sizes)
    jackknife = math.sqrt(163 / 164 * ((without - without.mean()) ** 2).sum())
    assert abs(error / jackknife - 1) < 0.02


def test_seeds_are_paired_and_have_a_student_interval() -> None:
    records = [record([1, 1, 1, -1], [1, -1, 1, -1]), record([1, 1, 1, 1], [1, -1, -1, -1])]
    row = only_row(*records)
    assert row["Score"] == f"87.5 +- {np.std([75, 100], ddof=1):.1f}"
    reach = student_t(1) * np.std([25, 75], ddof=1) / math.sqrt(2)
    assert row["Less untrained"] == f"+50.0 ({50 - reach:+.1f} to {50 + reach:+.1f})"
    assert row["Seeds"] == "2"


def test_a_tie_is_half_right_and_nan_no_number() -> None:
    assert only_row(record([0, 0, 0, 0], [1, 1, 1, 1]))["Score"] == "50.0 +- 0.0"
    row = only_row(record([math.nan, 1, 1, 1], [1, 1, 1, 1]))
    assert (row["Score"], row["Less untrained"], row["Margin (nats)"]) == ("NaN", "NaN", "NaN")
    assert only_row(record([math.nan, 1], [1, 1]), record([1, 1], [1, 1]))["Score"] == "NaN (1/2)"


def test_bits_per_byte_are_sums_over_sums() -> None:
    row = only_row(record([10, 30], [20, 60], unit="bits", bytes=[10, 20]))
    assert row["Measured"] == "bits per byte"
    assert row["Score"].startswith("1.333 +-")
    assert row["Less untrained"].startswith("-1.333 (")
    assert row["Margin (nats)"] == "-"


def test_right_labels_are_shares_of_all_labels() -> None:
    labels = {"model": [3, 8], "majority": [2, 4], "unigram": [4, 4]}
    row = only_row({"unit": "right", "items_sha256": "a", "values": labels, "sizes": [4, 10]})
    assert (row["Measured"], row["Items"], row["Margin (nats)"]) == ("accuracy (%)", "14", "-")
    shares = [row[name].split(" ")[0] for name in ("Score", "Majority", "Unigram", "Less majority")]
    assert shares == ["78.6", "42.9", "57.1", "+35.7"]


def test_the_report_shows_recorded_tasks(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs", label, seed=seed) for label in ("SM+R", "SM+G") for seed in (0, 1)]
    assert not task_table(group_runs(runs)).rows
    for run in runs[:3]:
        write_tasks(run.folder, {"name": record([1, math.nan, 1, 1], [1, -1, 1, 1], items=run.label)})
        write_tasks(run.folder, {"keyword": record([1, 1], [1, -1])})
    assert math.isnan(read_tasks(runs[0].folder)["name"]["values"]["model"][1])
    table = task_table(group_runs(runs))
    assert [(row[0], row[1], row[-1]) for row in table.rows] == [
        (label, task, seeds) for label, seeds in (("SM+G", "1"), ("SM+R", "2")) for task in ("name", "keyword")
    ]
    assert any("Not the same items in all rows: name." in note for note in table.notes)
    (section,) = (section for section in sections_of(group_runs(runs)) if section.name == "tasks")
    assert [shown.rows for shown in section.contents(group_runs(runs))[1]] == [
        [row[:5] + row[7:8] + row[10:] for row in table.rows]  # no other controls on record, so no columns of dashes
    ]
    (runs[0].folder / "tasks.json.gz").write_text("{")
    with pytest.raises(ValueError, match=r"tasks.json.gz is not readable as JSON: remove it and evaluate again"):
        task_table(group_runs(runs))
