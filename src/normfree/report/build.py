"""Build a report: read runs, write one page with its figures, tables and numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from normfree.analysis.groups import all_runs, group_runs
from normfree.files import write_atomically
from normfree.report.numbers import number_frames
from normfree.report.page import render_page, section_values
from normfree.report.render import to_pdf, to_png
from normfree.report.sections import sections_of
from normfree.report.tables.table import to_csv, to_latex, to_markdown
from normfree.store.runs import Run

WRITTEN = "report.json"
"""Lists the files of a report, so that the next one can remove those that it does not replace."""
_FOLDERS = {"figures", "tables", "numbers"}


def build_report(runs: Sequence[Run], output: Path, *, mix: bool = False, progress: bool = False) -> Path:
    """Write `output`/index.html, figures/*.pdf|png, tables/*.md|tex|csv and numbers/*.csv; returns the page's path.

    The same runs give the same bytes. Files are replaced atomically, index.html last, and files of an earlier report
    are removed. `progress` shows a bar on a terminal.

    Raises ValueError if there is no run, if runs differ in their recipe and `mix` is false, and if the output folder
    contains anything but a report.
    """
    groups = group_runs(runs, mix=mix)
    earlier = _earlier_files(output)
    written = []

    def write(name: str, content: str | bytes) -> None:
        write_atomically(output / name, content)
        written.append(name)

    for name, frame in number_frames(all_runs(groups)).items():
        write(f"numbers/{name}.csv", frame.to_csv(index=False, na_rep="NaN", lineterminator="\n"))
    shown = []
    for section in tqdm(sections_of(groups), desc="report", disable=None if progress else True, leave=False):
        figures, tables = section.draw(groups), section.make_tables(groups)
        for figure in figures:
            whole = figure.whole()
            write(f"figures/{figure.name}.pdf", to_pdf(whole))
            write(f"figures/{figure.name}.png", to_png(whole))
        for table in tables:
            for suffix, convert in (("md", to_markdown), ("tex", to_latex), ("csv", to_csv)):
                write(f"tables/{table.name}.{suffix}", convert(table))
        if figures or tables:
            shown.append(section_values(section, figures, tables))
    write("index.html", render_page(groups, shown))
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
