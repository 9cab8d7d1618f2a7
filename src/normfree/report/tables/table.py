"""A table of text cells, and its four spellings. Every spelling escapes what its format would obey."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Template

_LATEX = str.maketrans(
    {mark: "\\" + mark for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)
_MARKDOWN = str.maketrans(
    {mark: "\\" + mark for mark in "\\`*_[]|~"}
    | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ", "\r": " "}
)  # fmt: skip
_HTML = Template(
    Path(__file__).with_name("table.html.j2").read_text(encoding="utf-8"), autoescape=True, trim_blocks=True
)
# A spreadsheet runs a cell that begins like this.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Column:
    """One column; numbers are set flush right."""

    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Cells are finished text. The first cell of a row names the row."""

    name: str
    """Name of its files."""
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def to_markdown(table: Table) -> str:
    """GitHub's pipe table, with the caption above and the notes below."""
    titles, *rows = _escaped(table, lambda text: text.translate(_MARKDOWN))
    rules = ["---:" if column.numeric else "---" for column in table.columns]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rules, *rows))
    notes = "\n".join(f"- {note.translate(_MARKDOWN)}" for note in table.notes)
    parts = (f"**{table.caption.translate(_MARKDOWN)}**", lines, notes)
    return ("\n\n".join(filter(None, parts)) + "\n").replace("+-", "\N{PLUS-MINUS SIGN}")


def to_latex(table: Table) -> str:
    """A booktabs table."""
    layout = "".join("r" if column.numeric else "l" for column in table.columns)
    titles, *rows = (" & ".join(cells) + r" \\" for cells in _escaped(table, lambda text: text.translate(_LATEX)))
    notes = [rf"\par\smallskip\footnotesize {note.translate(_LATEX)}" for note in table.notes]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{table.caption.translate(_LATEX)}}}",
        rf"\label{{tab:{table.name}}}",
    ]
    lines += [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", titles, r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", *notes, r"\end{table}", ""]).replace("+-", r"$\pm$")


def to_csv(table: Table) -> str:
    """Comma-separated cells under a header line, without caption and notes.

    Text that a spreadsheet would run as a formula gets a leading apostrophe; numbers stay as they are.
    """
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(_escaped(table, _inert))
    return file.getvalue()


def to_html(table: Table) -> str:
    """A `<table>` with caption, scopes and notes."""
    return _HTML.render(vars(table)).replace("+-", "\N{PLUS-MINUS SIGN}")


def _escaped(table: Table, escape: Callable[[str], str]) -> list[list[str]]:
    """The titles, then the rows."""
    return [[escape(cell) for cell in row] for row in ([column.title for column in table.columns], *table.rows)]


def _inert(cell: str) -> str:
    if not cell.startswith(_FORMULA_STARTS) or cell == "-":
        return cell
    try:
        float(cell.rstrip(" %"))
    except ValueError:
        return f"'{cell}"
    return cell
