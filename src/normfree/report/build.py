"""Run folders in, a folder with a page out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from tqdm import tqdm

from normfree.analysis.groups import all_runs, group_runs
from normfree.files import write_atomically
from normfree.report import tables
from normfree.report.figure import PageFigure
from normfree.report.numbers import write_numbers
from normfree.report.page import figure_values, main_page, slopes_page
from normfree.report.render import to_pdf, to_png
from normfree.report.sections import members_of, sections_of
from normfree.store.runs import Run

WRITTEN = "report.json"
"""Names what a report wrote, so that the next one removes what it does not write again, and no other file."""
_OURS = {"figures", "tables", "numbers", "slopes.html"}
_SPELLINGS = {"md": tables.to_markdown, "tex": tables.to_latex, "csv": tables.to_csv}


def build_report(runs: Sequence[Run], output: Path, *, mix: bool = False, progress: bool = False) -> Path:
    """Write `output`/index.html, slopes.html if a run has a slope, figures/*.pdf|png, tables/*.md|tex|csv and
    numbers/*.csv.

    The same runs give the same bytes. Every file is replaced as a whole and index.html comes last; what an
    earlier report of other runs wrote is removed. Returns the path of index.html.
    `progress` shows a bar over the sections, on a terminal.

    Raises ValueError when there is no run, when runs differ in precision or recipe and `mix` is false, and for an
    output folder that holds something else than a report.
    """
    groups = group_runs(runs, mix=mix)
    earlier = _written_before(output)
    paths = write_numbers(all_runs(groups), output)
    with_slopes = any(tables.has_negative_slope(run) for run in all_runs(groups))
    pages: dict[str, list[dict[str, Any]]] = {"index": [], "slopes": []}
    chosen = [section for section in sections_of(groups) if section.page == "index" or with_slopes]
    for section in tqdm(chosen, desc="report", disable=None if progress else True, leave=False):
        members = members_of(section, groups)
        if not members:
            continue
        figures = [figure for figure in section.figures(members) if figure is not None]
        made = [table for make in section.tables.values() if (table := make(members)).rows]
        for figure in figures:
            paths |= write_figure(figure, output)
        paths |= write_tables(made, output)
        if figures or made:
            pages[section.page].append(
                {
                    "name": section.name,
                    "title": section.title,
                    "menu": section.menu or section.title,
                    "folded": section.folded,
                    "figures": [figure_values(figure) for figure in figures],
                    "tables": [Markup(tables.to_html(table)) for table in made],
                    "note": section.note(members),
                }
            )
    texts = {"slopes.html": slopes_page(groups, pages["slopes"])} if with_slopes else {}
    texts["index.html"] = main_page(groups, pages["index"], with_slopes=with_slopes)
    for name, text in texts.items():
        write_atomically(output / name, text)
        paths.add(output / name)
    names = sorted(path.relative_to(output).as_posix() for path in paths)
    for name in earlier - set(names):
        (output / name).unlink(missing_ok=True)
    write_atomically(output / WRITTEN, json.dumps(names, indent=1) + "\n")
    return output / "index.html"


def write_tables(made: Sequence[tables.Table], output: Path) -> set[Path]:
    """Write `output`/tables/NAME.md|tex|csv; returns the paths."""
    paths = set()
    for table in made:
        for suffix, spell in _SPELLINGS.items():
            path = output / "tables" / f"{table.name}.{suffix}"
            write_atomically(path, spell(table))
            paths.add(path)
    return paths


def write_figure(figure: PageFigure, output: Path) -> set[Path]:
    """Write `output`/figures/NAME.pdf|png; returns the paths."""
    paths = set()
    whole = figure.whole()
    for suffix, render in (("pdf", to_pdf), ("png", to_png)):
        path = output / "figures" / f"{figure.name}.{suffix}"
        write_atomically(path, render(whole))
        paths.add(path)
    return paths


def _written_before(output: Path) -> set[str]:
    """Names of the files of an earlier report. Raises ValueError for a folder that holds something else."""
    if (output / WRITTEN).is_file():
        return set(json.loads((output / WRITTEN).read_text(encoding="utf-8")))
    page = output / "index.html"
    if page.is_file() and b"Made by normfree" in page.read_bytes():
        return set()
    names = {path.name for path in output.glob("[!.]*")}
    if foreign := sorted(names - _OURS):  # another process may be writing the same
        raise ValueError(f"output={output} holds {foreign[0]}, so it is no report; name a new or empty folder")
    return set()
