"""Build a report: read runs, write one page with its figures, tables and numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from normfree.analysis.entropy import shares_of_ceiling, trained_heads
from normfree.analysis.groups import all_runs, parts_of
from normfree.files import write_atomically
from normfree.report.page import render_page, section_values
from normfree.report.render import to_file
from normfree.report.sections import sections_of
from normfree.report.tables.table import to_csv, to_latex, to_markdown
from normfree.store.runs import Run, run_frame

WRITTEN = "report.json"
"""Lists the files of a report, so that the next one can remove those that it does not replace."""
_FOLDERS = {"figures", "tables", "numbers"}


def build_report(
    runs: Sequence[Run], output: Path, *, mix: bool = False, baseline: str = "", progress: bool = False
) -> Path:
    """Write `output`/index.html, figures/*.pdf|png, tables/*.md|tex|csv and numbers/*.csv; returns the page's path.

    With `mix`, each recipe has its own part of the page, and there are no figures/. `baseline` is the label or variant
    to compare all others with, by default every pair is. `progress` shows a bar on a terminal. The same runs give the
    same bytes; files are replaced atomically, index.html last, and files of an earlier report are removed.

    Raises ValueError for no run, for runs of several recipes without `mix`, for a baseline that no run has, and for an
    output folder that contains anything but a report.
    """
    parts = parts_of(runs, mix=mix, baseline=baseline)
    earlier = _earlier_files(output)
    written = []

    def write(name: str, content: str | bytes) -> None:
        write_atomically(output / name, content)
        written.append(name)

    members = [run for part in parts for run in all_runs(part.groups)]
    for name, frame in number_frames(members).items():
        write(f"numbers/{name}.csv", frame.to_csv(index=False, na_rep="NaN", lineterminator="\n"))
    shown: list[list[dict[str, Any]]] = [[] for _ in parts]
    steps = [(place, section) for place, part in enumerate(parts) for section in sections_of(part.groups)]
    for place, section in tqdm(steps, desc="report", disable=None if progress else True, leave=False):
        prefix = f"part{place + 1}-" if len(parts) > 1 else ""
        figures, tables = section.contents(parts[place].groups, prefix)
        for figure in figures if len(parts) == 1 else ():
            whole = figure.whole()
            for suffix in ("pdf", "png"):
                write(f"figures/{figure.name}.{suffix}", to_file(whole, suffix))
        for table in tables:
            for suffix, convert in (("md", to_markdown), ("tex", to_latex), ("csv", to_csv)):
                write(f"tables/{table.name}.{suffix}", convert(table))
        if figures or tables:
            shown[place].append(section_values(replace(section, name=prefix + section.name), figures, tables))
    write("index.html", render_page(parts, shown))
    for name in earlier - set(written):
        (output / name).unlink(missing_ok=True)
    write_atomically(output / WRITTEN, json.dumps(sorted(written), indent=1) + "\n")
    return output / "index.html"


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


def _earlier_files(output: Path) -> set[str]:
    """Names of the files of an earlier report. Raises ValueError if the folder contains anything else."""
    if (output / WRITTEN).is_file():
        return set(json.loads((output / WRITTEN).read_text(encoding="utf-8")))
    names = {path.name for path in output.glob("[!.]*")}
    if foreign := sorted(names - _FOLDERS):  # these exist if an earlier report was interrupted
        raise ValueError(f"output={output} holds {foreign[0]}, so it is no report; name a new or empty folder")
    return set()
