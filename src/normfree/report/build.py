"""Run folders in, a folder with a page out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from normfree import tables
from normfree.analysis import all_runs, group_runs
from normfree.cost import trade_off, trade_off_table
from normfree.manifest import write_atomically
from normfree.records import Run
from normfree.report.figures import FIGURES, PageFigure, main_figures, slope_figures
from normfree.report.numbers import write_numbers
from normfree.report.page import figure_values, main_page, slopes_page
from normfree.report.render import to_pdf, to_png

TABLES = (
    *("perplexity", "differences", "gap", "claims", "overload", "ranges", "verdicts", "runs", "slopes"),
    "perplexity-communication",
)
_SPELLINGS = {"md": tables.to_markdown, "tex": tables.to_latex, "csv": tables.to_csv}


def build_report(runs: Sequence[Run], output: Path, *, mix: bool = False, progress: bool = False) -> Path:
    """Write `output`/index.html, slopes.html if a run has a slope, figures/*.pdf|png, tables/*.md|tex|csv and
    numbers/*.csv.

    The same runs give the same bytes. Every file is replaced as a whole and index.html comes last; what an
    earlier report of other runs wrote under these names is removed. Returns the path of index.html.
    `progress` shows a bar over the figures, on a terminal.

    Raises ValueError when there is no run, or when runs differ in precision or recipe and `mix` is false.
    """
    groups = group_runs(runs, mix=mix)
    ordered = all_runs(groups)
    with_slopes = any(tables.has_negative_slope(run) for run in ordered)
    written = {
        "perplexity": tables.perplexity_table(groups),
        "differences": tables.difference_table(groups),
        "gap": tables.gap_table(groups),
        "claims": tables.claim_table(groups),
        "overload": tables.overload_table(groups),
        "ranges": tables.range_table(groups),
        "verdicts": tables.verdict_table(ordered),
        "runs": tables.run_table(ordered),
        "communication": trade_off_table(trade_off(groups)),
    }
    if with_slopes:
        written["slopes"] = tables.slope_table(groups)
    kept = write_tables(list(written.values()), output) | write_numbers(ordered, output)
    on_main, on_slopes = main_figures(groups), slope_figures(groups) if with_slopes else []
    drawn = {}
    for figure in tqdm([*on_main, *on_slopes], desc="figures", disable=None if progress else True, leave=False):
        drawn[figure.name] = figure_values(figure)
        kept |= write_figure(figure, output)
    pages = {}
    if with_slopes:
        of_slopes = {figure.name: drawn.pop(figure.name) for figure in on_slopes}
        pages["slopes.html"] = slopes_page(groups, written["slopes"], of_slopes)
    pages["index.html"] = main_page(groups, written, drawn, with_slopes=with_slopes)
    for name, text in pages.items():
        write_atomically(output / name, text)
    _remove_others(output, kept | {output / name for name in pages})
    return output / "index.html"


def write_tables(written: Sequence[tables.Table], output: Path) -> set[Path]:
    """Write `output`/tables/NAME.md|tex|csv; returns the paths."""
    kept = set()
    for table in written:
        for suffix, spell in _SPELLINGS.items():
            path = output / "tables" / f"{table.name}.{suffix}"
            write_atomically(path, spell(table))
            kept.add(path)
    return kept


def write_figure(figure: PageFigure, output: Path) -> set[Path]:
    """Write `output`/figures/NAME.pdf|png; returns the paths."""
    kept = set()
    whole = figure.whole()
    for suffix, render in (("pdf", to_pdf), ("png", to_png)):
        path = output / "figures" / f"{figure.name}.{suffix}"
        write_atomically(path, render(whole))
        kept.add(path)
    return kept


def _remove_others(output: Path, kept: set[Path]) -> None:
    """Remove what an earlier report wrote and this one did not; never a file of another name."""
    ours = {output / "slopes.html"}
    ours |= {output / "figures" / f"{name}.{suffix}" for name in FIGURES for suffix in ("pdf", "png")}
    ours |= {output / "tables" / f"{name}.{suffix}" for name in TABLES for suffix in _SPELLINGS}
    for path in ours - kept:
        path.unlink(missing_ok=True)
