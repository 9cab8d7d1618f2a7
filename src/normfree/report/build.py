"""Build a report: read runs, write one page with its figures, tables and numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from normfree.analysis.groups import all_runs, parts_of
from normfree.files import write_atomically
from normfree.report.csv_export import number_frames
from normfree.report.page import render_page, section_values
from normfree.report.render import to_pdf, to_png
from normfree.report.sections import sections_of
from normfree.report.tables.table import to_csv, to_latex, to_markdown
from normfree.store.runs import Run

WRITTEN = "report.json"
"""Lists the files of a report, so that the next one can remove those that it does not replace."""
_FOLDERS = {"figures", "tables", "numbers"}


def build_report(
    runs: Sequence[Run], output: Path, *, mix: bool = False, baseline: str = "", progress: bool = False
) -> Path:
    """Write `output`/index.html, figures/*.pdf|png, tables/*.md|tex|csv and numbers/*.csv; returns the page's path.

    With `mix`, each recipe has its own part of the page; only a report on one recipe has figures/. `baseline` is the
    label or variant to compare all others with; by default all pairs with a common seed are compared. The same runs
    give the same bytes. Files are replaced atomically, index.html last, and files of an earlier report are removed.
    `progress` shows a bar on a terminal.

    Raises ValueError if there is no run, if runs differ in their recipe and `mix` is false, if no run has the baseline,
    and if the output folder contains anything but a report.
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
        figures, tables = section.draw(parts[place].groups), section.make_tables(parts[place].groups)
        figures = [replace(figure, name=prefix + figure.name) for figure in figures]
        tables = [replace(table, name=prefix + table.name) for table in tables]
        for figure in figures if len(parts) == 1 else ():
            whole = figure.whole()
            write(f"figures/{figure.name}.pdf", to_pdf(whole))
            write(f"figures/{figure.name}.png", to_png(whole))
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


def _earlier_files(output: Path) -> set[str]:
    """Names of the files of an earlier report. Raises ValueError if the folder contains anything else."""
    if (output / WRITTEN).is_file():
        return set(json.loads((output / WRITTEN).read_text(encoding="utf-8")))
    names = {path.name for path in output.glob("[!.]*")}
    if foreign := sorted(names - _FOLDERS):  # these exist if an earlier report was interrupted
        raise ValueError(f"output={output} holds {foreign[0]}, so it is no report; name a new or empty folder")
    return set()
