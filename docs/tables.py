"""Fill the tables of README.md and docs/ from the records in results/: `make tables`.

A page holds a marker, and all between it and `<!-- end -->` is made from runs:

    <!-- table: perplexity of results/quick -->
    <!-- end -->

Tables: rates, those of study_tables.py, and every table of the report. Several folders may be given, with the shell's
wildcards. `mixed` before `-->` shows runs of different recipes side by side, which is refused otherwise. A test fails
when a page differs from what the records give.

`<!-- quantities -->` is the table of all that can be measured.

A figure of the report's main page is drawn the same way, without a test, since another matplotlib gives other bytes:

    <!-- figure: entropy_nats-heads of results/quick -->
    ![What it shows](docs/figures/NAME.png)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from docs.study_tables import STUDY_TABLES
from normfree.analysis.groups import Group, group_runs
from normfree.files import write_atomically
from normfree.measures import MEASURES
from normfree.report.plots.style import to_file
from normfree.report.sections import SECTIONS, figures_of
from normfree.report.tables.results import rate_table
from normfree.report.tables.table import Table, to_markdown, without_empty_columns
from normfree.store.quantities import QUANTITIES
from normfree.store.runs import find_runs

ROOT = Path(__file__).parents[1]
END = "<!-- end -->"
MARKER = re.compile(
    r"(<!-- table: (?P<name>\S+) of (?P<places>[^>]+?)(?P<mixed> mixed)? -->\n).*?<!-- end -->", re.DOTALL
)
QUANTITIES_MARKER = re.compile(r"(<!-- quantities -->\n).*?<!-- end -->", re.DOTALL)
FIGURE = re.compile(
    r"<!-- figure: (?P<name>\S+) of (?P<places>[^>]+?)(?P<mixed> mixed)? -->\n!\[[^\]]*\]\((?P<path>[^)\s]+)\)"
)


TABLES: dict[str, Callable[[Sequence[Group]], Table]] = {
    "rates": rate_table,
    **STUDY_TABLES,
    **{name: make for section in SECTIONS for name, make in section.tables.items()},
}


def quantity_table() -> Table:
    """Every quantity: the measure that gives it, axes, unit, ceiling and meaning."""
    given_by = {name: measure for measure, kind in MEASURES.items() for name in kind.gives}
    rows = tuple(
        (
            quantity.name,
            given_by.get(quantity.name, "every training run"),
            ", ".join(quantity.axes) or "-",
            quantity.unit or "-",
            "-" if quantity.ceiling is None else str(quantity.ceiling),
            quantity.meaning,
        )
        for quantity in QUANTITIES.values()
    )
    titles = ("Quantity", "Measure", "Axes", "Unit", "Ceiling", "Meaning")
    return Table("quantities", "Quantities", titles, rows, words=titles)


def pages() -> list[Path]:
    """Every page that may hold a marker."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The text with every marked table made anew. Raises ValueError for an unknown table or a folder without runs."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; allowed: {', '.join(TABLES)}")
        groups = group_runs(find_runs(_folders(match["places"])), mix=bool(match["mixed"]))
        return f"{match[1]}\n{to_markdown(without_empty_columns(TABLES[name](groups)))}\n{END}"

    text = QUANTITIES_MARKER.sub(lambda match: f"{match[1]}\n{to_markdown(quantity_table())}\n{END}", text)
    return MARKER.sub(table, text)


def draw_figures(page: Path) -> None:
    """Write the figures that the page marks. Raises ValueError for a figure that its runs do not give."""
    for match in FIGURE.finditer(page.read_text()):
        groups = group_runs(find_runs(_folders(match["places"])), mix=bool(match["mixed"]))
        figures = {figure.name: figure for figure in figures_of(groups)}
        if match["name"] not in figures:
            raise ValueError(f"no figure {match['name']!r} of these runs; there are: {', '.join(figures)}")
        write_atomically(page.parent / match["path"], to_file(figures[match["name"]].whole(), "png"))


def _folders(places: str) -> list[Path]:
    """The folders behind names with wildcards. Raises ValueError for a name that matches nothing."""
    matches = {place: sorted(ROOT.glob(place)) for place in places.split()}
    if missing := [place for place, folders in matches.items() if not folders]:
        raise ValueError(f"no folder {', '.join(missing)}")
    return [folder for folders in matches.values() for folder in folders]


def main() -> None:
    """Rewrite the pages that changed, and draw the figures."""
    for page in pages():
        old = page.read_text()
        new = filled(old)
        if new != old:
            write_atomically(page, new)
            print(f"{page.relative_to(ROOT)} changed")
        draw_figures(page)


if __name__ == "__main__":
    main()
