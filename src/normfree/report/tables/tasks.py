"""The table of tasks: a row for each model and task, beside an untrained model and token frequencies."""

# I items: mirrored twos of pairs, or HumanEval's problems

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfree.analysis.groups import Group
from normfree.analysis.seeds import decimals, paired_difference, summarise
from normfree.report.tables.table import Table
from normfree.store.tasks import read_tasks

Records = Sequence[Mapping[str, Any]]  # records of one task, one a seed
Score = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # (I,) scores of items; mirrored pairs are one item
CONTROLS = ("untrained", "unigram", "majority")


def _percent(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    """A tie is half right."""
    return (50 + 50 * np.sign(margins)).reshape(-1, 2).mean(1)


def _nats(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    return margins.reshape(-1, 2).mean(1)


def _both_ways(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    return 50 + 50 * np.sign(_nats(margins))


def ratio(numbers_I: NDArray[np.float64], sizes_I: NDArray[np.float64]) -> tuple[float, float]:
    """Sum of numbers over a sum of sizes, and its linearised standard error over items; a mean's if sizes are equal.

    Source: Cochran 1977, section 2.11.
    """
    value = numbers_I.sum() / sizes_I.sum()
    residuals_I, count = numbers_I - value * sizes_I, len(numbers_I)
    variance = (residuals_I**2).sum() * count / (count - 1) if count > 1 else math.nan
    return float(value), float(np.sqrt(variance) / sizes_I.sum())


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
    titles = ("Variant", "Task", "Measured", "Score", *map(str.capitalize, CONTROLS), *map("Less {}".format, CONTROLS))
    titles += ("Margin (nats)", "Margin less untrained", "Both ways (%)", "Items", "Seeds")
    notes = [
        "Accuracy: pairs whose good text is likelier than the bad one. A mirror of each pair swaps the same pieces the "
        "other way round: 50 % is chance, and what a unigram gets. Margin: log-likelihood of the good text less that "
        "of the bad one; 0 for a unigram. Both ways: mirrored twos whose margins sum to more than 0, so that a "
        "preference for one piece does not count. Bits per byte: lower is better. After fine-tuning, accuracy is the "
        "share of right labels; majority: the most frequent label of the training, unigram: that of each token.",
        "+-: standard error over items for one seed, else the sample standard deviation over seeds. In brackets: 95 % "
        "interval of the difference paired by item, over items for one seed (normal), else over seeds (Student-t).",
    ]
    if differing := [task for task, hashes in items.items() if len(hashes) > 1]:
        notes.append(f"Not the same items in all rows: {', '.join(differing)}. Compare each row with its own controls.")
    return Table("tasks", "What the models can do", titles, rows, notes, words=titles[1:3])


def _cells(records: Records) -> tuple[str, ...]:
    unit = records[0]["unit"]
    measured, score, digits = "accuracy (%)", _percent if unit == "nats" else partial(np.multiply, 100), 1
    if unit == "bits":
        measured, score, digits = "bits per byte", np.array, 3
    counts = sorted({sum(record.get("sizes", [len(record["values"]["model"])])) for record in records})
    cells = [_level(records, score, name, digits) for name in ("model", *CONTROLS)]
    cells += [_difference(records, score, name, digits) for name in CONTROLS]
    more = ["-"] * 3
    if unit == "nats":
        more = [_level(records, _nats, "model", 3), _difference(records, _nats, "untrained", 3)]
        more += [_level(records, _both_ways, "model", 1)]
    return (measured, *cells, *more, " or ".join(map(str, counts)), str(len(records)))


def _level(records: Records, score: Score, name: str, digits: int) -> str:
    ratios = _ratios(records, score, name)
    if len(ratios) != 1:
        return summarise([value for value, _ in ratios]).text(digits)
    [(value, error)] = ratios
    return f"{decimals(value, digits)} +- {decimals(error, digits)}" if math.isfinite(value) else "NaN"


def _difference(records: Records, score: Score, control: str, digits: int) -> str:
    """`+23.1 (+19.8 to +26.4)`: the model less the control, paired by item."""
    ratios = _ratios(records, score, "model", less=control)
    if not ratios:
        return "-"
    mean, error = ratios[0]
    low, high = mean - 1.96 * error, mean + 1.96 * error
    if len(ratios) > 1:
        seeds = paired_difference(dict(enumerate(value for value, _ in ratios)), dict.fromkeys(range(len(ratios)), 0.0))
        mean, low, high = seeds.mean, seeds.low, seeds.high
    if not math.isfinite(mean):
        return "NaN"
    return f"{mean:+z.{digits}f} ({low:+z.{digits}f} to {high:+z.{digits}f})"


def _ratios(records: Records, score: Score, name: str, less: str | None = None) -> list[tuple[float, float]]:
    """Score and standard error of each seed; none if one of them has no such values."""
    if any((less or name) not in record["values"] for record in records):
        return []
    ratios = []
    for record in records:
        scores = {key: score(np.array(values, dtype=np.float64)) for key, values in record["values"].items()}
        numbers_I = scores[name] - scores[less] if less else scores[name]
        sizes = record.get("bytes", record.get("sizes", np.ones(len(numbers_I))))
        ratios.append(ratio(numbers_I, np.array(sizes, dtype=np.float64)))
    return ratios
