"""The numbers behind the page as they were measured, for figures and statistics of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from normfree.analysis.entropy import shares_of_ceiling, trained_heads
from normfree.analysis.quantities import newest_values
from normfree.files import write_atomically
from normfree.store.runs import Run, run_frame


def write_numbers(runs: Sequence[Run], output: Path) -> set[Path]:
    """Write `output`/numbers/runs.csv, layers.csv and heads.csv, a row a run, layer or head; returns the paths."""
    paths = set()
    of_runs = run_frame(runs)
    of_runs.insert(0, "run", [run.place for run in runs])
    scalars = {name for run in runs for name, quantity in run.quantities.items() if not quantity.axes}
    for name in sorted(scalars - set(of_runs.columns)):
        if any(run.last("final", name) is not None for run in runs):
            of_runs[name] = [run.last("final", name) for run in runs]
    of_runs = of_runs.drop(columns="folder")  # says where a machine keeps it
    frames = {"runs": of_runs, "layers": quantity_frame(runs, "layer"), "heads": quantity_frame(runs, "layer", "head")}
    for name, frame in frames.items():
        path = output / "numbers" / f"{name}.csv"
        write_atomically(path, frame.to_csv(index=False, na_rep="NaN", lineterminator="\n"))
        paths.add(path)
    return paths


def quantity_frame(runs: Sequence[Run], *axes: str) -> pd.DataFrame:
    """Every quantity with these axes, a column each, of runs that were measured at their end.

    One row a layer (axes `layer`) or a head (`layer`, `head`). `run` is study/name; layers have the model's
    own numbers, heads count from 0. NaN is a value that is not finite; what a run did not record is missing.
    """
    rows = []
    for run in runs:
        columns = {
            name: values
            for name, quantity in run.quantities.items()
            if quantity.axes == axes and run.status == "finished" and run.last("final", name) is not None
            for values in [np.array(newest_values(run, name))]
        }
        if axes == ("layer", "head") and (heads := trained_heads(run)) is not None:
            columns["share_of_ceiling"] = shares_of_ceiling(heads)
        by_shape: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
        for name, values in columns.items():
            by_shape.setdefault(values.shape, {})[name] = values
        for shape, alike in by_shape.items():
            numbers = run.layer_numbers(next(iter(alike)), shape[0])
            for index in np.ndindex(shape):
                place = dict(zip(axes, (numbers[index[0]], *index[1:]), strict=True))
                values = {name: float(values[index]) for name, values in alike.items()}
                rows.append({"run": run.place, "label": run.label, "seed": run.seed, **place, **values})
    return pd.DataFrame(rows, columns=None if rows else ["run", "label", "seed", *axes])
