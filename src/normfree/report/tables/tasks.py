"""The table of tasks: a row for each model and task, beside an untrained model and token frequencies.

Shapes: P pairs, I items: mirrored twos of pairs, or HumanEval's problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normfree.analysis.groups import Group
from normfree.analysis.seeds import decimals, paired_difference, summarise
from normfree.report.tables.table import Table
from normfree.store.tasks import read_tasks

_MODEL, _CONTROLS = "model", ("untrained", "unigram")
Records = Sequence[Mapping[str, Any]]
"""Records of one task, one a seed."""
Sums = tuple[NDArray[np.float64], NDArray[np.float64]]
"""What each item adds to a score, and its size."""
ItemsOf = Callable[[Mapping[str, Any], str], Sums]


class Ratio(NamedTuple):
    """Sum of numbers over a sum of sizes, with its standard error over items."""

    value: float
    standard_error: float


def ratio(numbers_I: NDArray[np.float64], sizes_I: NDArray[np.float64]) -> Ratio:
    """Ratio estimator and its linearised standard error (Cochran 1977, section 2.11); a mean's if sizes are equal."""
    value = numbers_I.sum() / sizes_I.sum()
    residuals_I, count = numbers_I - value * sizes_I, len(numbers_I)
    variance = (residuals_I**2).sum() * count / (count - 1) if count > 1 else math.nan
    return Ratio(float(value), float(np.sqrt(variance) / sizes_I.sum()))


def task_table(groups: Sequence[Group]) -> Table:
    """How well each model does on each task that it was evaluated on."""
    return tasks_table({group.name: [read_tasks(run.folder) for run in group.runs] for group in groups})


def tasks_table(tasks_of_seeds: Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]]) -> Table:
    """The table of models by name: for each seed, records by task."""
    rows, items = [], {}
    for name, of_seeds in tasks_of_seeds.items():
        for task in dict.fromkeys(task for tasks in of_seeds for task in tasks):
            records = [tasks[task] for tasks in of_seeds if task in tasks]
            rows.append((name, task, *_cells(records)))
            items.setdefault(task, set()).update(record["items_sha256"] for record in records)
    titles = ("Variant", "Task", "Measured", "Score", "Untrained", "Unigram", "Less untrained", "Less unigram")
    titles += ("Margin (nats)", "Margin less untrained", "Both ways (%)", "Items", "Seeds")
    notes = [
        "Accuracy: pairs whose good text is likelier than the bad one. A mirror of each pair swaps the same pieces the "
        "other way round: 50 % is chance, and what a unigram gets. Margin: log-likelihood of the good text less that "
        "of the bad one; 0 for a unigram. Both ways: mirrored twos whose margins sum to more than 0, so that a "
        "preference for one piece does not count. Bits per byte: lower is better.",
        "+-: standard error over items for one seed, else the sample standard deviation over seeds. In brackets: 95 % "
        "interval of the difference paired by item, over items for one seed (normal), else over seeds (Student-t).",
    ]
    if differing := [task for task, hashes in items.items() if len(hashes) > 1]:
        notes.append(f"Not the same items in all rows: {', '.join(differing)}. Compare each row with its own controls.")
    return Table("tasks", "What the models can do", titles, rows, notes, words=titles[1:3])


def _cells(records: Records) -> tuple[str, ...]:
    is_pairs = records[0]["unit"] == "nats"
    measured, scores, digits = ("accuracy (%)", _percent, 1) if is_pairs else ("bits per byte", _bits, 3)
    counts = sorted({len(record["values"][_MODEL]) for record in records})
    cells = [_over_seeds(records, scores, name, digits) for name in (_MODEL, *_CONTROLS)]
    cells += [_difference(records, scores, name, digits) for name in _CONTROLS]
    more = ["-"] * 3
    if is_pairs:
        more = [_over_seeds(records, _nats, _MODEL, 3), _difference(records, _nats, "untrained", 3)]
        more += [_over_seeds(records, _both_ways, _MODEL, 1)]
    return (measured, *cells, *more, " or ".join(map(str, counts)), str(len(records)))


def _bits(record: Mapping[str, Any], name: str) -> Sums:
    return _values(record, name), np.array(record["bytes"], dtype=np.float64)


def _percent(record: Mapping[str, Any], name: str) -> Sums:
    """A tie is half right."""
    return _by_twos(50 + 50 * np.sign(_values(record, name)))


def _nats(record: Mapping[str, Any], name: str) -> Sums:
    return _by_twos(_values(record, name))


def _both_ways(record: Mapping[str, Any], name: str) -> Sums:
    margins_I, sizes_I = _nats(record, name)
    return 50 + 50 * np.sign(margins_I), sizes_I / 2


def _values(record: Mapping[str, Any], name: str) -> NDArray[np.float64]:
    return np.array(record["values"][name], dtype=np.float64)


def _by_twos(values_P: NDArray[np.float64]) -> Sums:
    """Two mirrored pairs are one item of size 2, as they are not independent."""
    sums_I = values_P.reshape(-1, 2).sum(axis=1)
    return sums_I, np.full(len(sums_I), 2.0)


def _over_seeds(records: Records, items_of: ItemsOf, name: str, digits: int) -> str:
    if any(name not in record["values"] for record in records):
        return "-"
    ratios = [ratio(*items_of(record, name)) for record in records]
    if len(ratios) > 1:
        return summarise([of_seed.value for of_seed in ratios]).text(digits)
    value, error = ratios[0]
    return f"{decimals(value, digits)} +- {decimals(error, digits)}" if math.isfinite(value) else "NaN"


def _difference(records: Records, items_of: ItemsOf, control: str, digits: int) -> str:
    """`+23.1 (+19.8 to +26.4)`: the model less the control, paired by item."""
    if any(control not in record["values"] for record in records):
        return "-"
    if len(records) == 1:
        (ours_I, sizes_I), (theirs_I, _) = items_of(records[0], _MODEL), items_of(records[0], control)
        mean, error = ratio(ours_I - theirs_I, sizes_I)
        low, high = mean - 1.96 * error, mean + 1.96 * error
    else:
        ours, theirs = ([ratio(*items_of(record, name)).value for record in records] for name in (_MODEL, control))
        over_seeds = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
        mean, low, high = over_seeds.mean, over_seeds.low, over_seeds.high
    if not math.isfinite(mean):
        return "NaN"
    return f"{mean:+z.{digits}f} ({low:+z.{digits}f} to {high:+z.{digits}f})"
