"""The measured numbers behind the page, for your own figures and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from normfree.analysis.entropy import shares_of_ceiling, trained_heads
from normfree.store.runs import Run, run_frame


def number_frames(runs: Sequence[Run]) -> dict[str, pd.DataFrame]:
    """Frames `runs`, `layers` and `heads`, with a row for each of them."""
    of_runs = run_frame(runs).drop(columns="folder")  # a path of this machine
    of_runs.insert(0, "run", [run.place for run in runs])
    scalars = {name for run in runs for name, quantity in run.quantities.items() if not quantity.axes}
    for name in sorted(scalars - set(of_runs.columns)):
        if any(run.last("final", name) is not None for run in runs):
            of_runs[name] = [run.last("final", name) for run in runs]
    return {"runs": of_runs, "layers": quantity_frame(runs, "layer"), "heads": quantity_frame(runs, "layer", "head")}


def quantity_frame(runs: Sequence[Run], *axes: str) -> pd.DataFrame:
    """Every quantity with these axes, one per column, of runs that were measured at their end.

    One row per layer (axes `layer`) or head (`layer`, `head`). `run` is study/name; layers have the model's
    own numbers, heads count from 0. NaN is a value that is not finite; a missing value was not recorded.
    """
    rows: dict[Any, dict[str, float]] = {}
    for run in runs:
        finals = {name: run.last("final", name) for name, quantity in run.quantities.items() if quantity.axes == axes}
        columns = {name: np.array(value) for name, value in finals.items() if run.status == "finished" and value}
        if axes == ("layer", "head") and (heads := trained_heads(run)) is not None:
            columns["share_of_ceiling"] = shares_of_ceiling(heads)
        for name, values in columns.items():
            numbers = run.layer_numbers("entropy_nats" if name == "share_of_ceiling" else name, len(values))
            for index, value in np.ndenumerate(values):
                place = (run.place, run.label, run.seed, numbers[index[0]], *index[1:])
                rows.setdefault((values.shape, place), {})[name] = float(value)  # a shared slope has its own row
    keys = ["run", "label", "seed", *axes]
    records = [{**dict(zip(keys, place, strict=True)), **values} for (_, place), values in rows.items()]
    return pd.DataFrame(records, columns=None if records else keys)
