"""The recorded values of any quantity: at the end of a run, and over training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from normfree.analysis.entropy import Floats
from normfree.analysis.groups import Group
from normfree.store.quantities import Quantity
from normfree.store.runs import Run


def values_over_training(run: Run, name: str) -> list[tuple[int, Floats]]:
    """(step, values) of a quantity, oldest first: from probes, else from validation, else from the training log."""
    for split in ("probe", "validation", "train"):
        if series := run.series(split, name):
            return [(step, np.array(value, dtype=float)) for step, value in series]
    return []


def newest_values(run: Run, name: str) -> Floats | None:
    """The values after training, else the newest before that; None if the quantity was never measured."""
    final = run.last("final", name)
    if final is not None:
        return np.array(final, dtype=float)
    series = values_over_training(run, name)
    return series[-1][1] if series else None


def recorded_quantities(groups: Sequence[Group], *, drawn: str) -> list[Quantity]:
    """Quantities that runs of these groups recorded and the report draws in this place (`open` or `folded`)."""
    runs = [run for group in groups for run in group.drawn]
    by_name = {q.name: q for run in runs for q in run.quantities.values() if q.drawn == drawn}
    return [q for q in by_name.values() if any(newest_values(run, q.name) is not None for run in runs)]
