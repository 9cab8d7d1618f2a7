"""A table of text cells, and its four spellings. Every spelling escapes what its format would obey."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from html import escape

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)
_MARKDOWN = str.maketrans(
    {
        **{mark: "\\" + mark for mark in "\\`*_[]|~"},
        "<": "&lt;",
        ">": "&gt;",
        "&": "&amp;",
        "\n": " ",
        "\r": " ",
    }
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
    titles = [column.title.translate(_MARKDOWN) for column in table.columns]
    rules = ["---:" if column.numeric else "---" for column in table.columns]
    rows = [[_typographic(cell).translate(_MARKDOWN) for cell in row] for row in table.rows]
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, rules, *rows)]
    notes = [f"- {_typographic(note).translate(_MARKDOWN)}" for note in table.notes]
    parts = [f"**{table.caption.translate(_MARKDOWN)}**", "\n".join(lines), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_latex(table: Table) -> str:
    """A booktabs table."""
    layout = "".join("r" if column.numeric else "l" for column in table.columns)
    titles = " & ".join(column.title.translate(_LATEX) for column in table.columns)
    rows = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in table.rows]
    notes = [rf"\par\smallskip\footnotesize {_latex(note)}" for note in table.notes]
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{table.caption.translate(_LATEX)}}}"]
    lines += [rf"\label{{tab:{table.name}}}", rf"\begin{{tabular}}{{{layout}}}", r"\toprule"]
    lines += [titles + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", *notes, r"\end{table}"]
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """Comma-separated cells under a header line, without caption and notes.

    Text that a spreadsheet would run as a formula gets a leading apostrophe; numbers stay as they are.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([_inert(column.title) for column in table.columns])
    writer.writerows([[_inert(cell) for cell in row] for row in table.rows])
    return file.getvalue()


def to_html(table: Table) -> str:
    """A `<table>` with caption, scopes and notes, in an area that scrolls sideways and takes the keyboard."""
    head = "".join(f'<th scope="col"{_number(c)}>{escape(c.title)}</th>' for c in table.columns)
    body = "\n".join(f"<tr>{_html_row(table.columns, row)}</tr>" for row in table.rows)
    notes = "".join(f"<li>{escape(_typographic(note))}</li>" for note in table.notes)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="caption-{escape(table.name)}">\n'
        "<table>\n"
        f'<caption id="caption-{escape(table.name)}"><span>{escape(table.caption)}</span></caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>\n"
        + (f'<ul class="notes">{notes}</ul>\n' if notes else "")
    )


def _html_row(columns: tuple[Column, ...], row: tuple[str, ...]) -> str:
    first = f'<th scope="row"><span>{escape(row[0])}</span></th>'
    rest = zip(columns[1:], row[1:], strict=True)
    return first + "".join(f"<td{_number(c)}>{escape(_typographic(cell))}</td>" for c, cell in rest)


def _number(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _typographic(text: str) -> str:
    return text.replace("+-", "\N{PLUS-MINUS SIGN}")


def _latex(cell: str) -> str:
    return cell.translate(_LATEX).replace("+-", r"$\pm$")


def _inert(cell: str) -> str:
    if not cell.startswith(_FORMULA_STARTS) or cell == "-":
        return cell
    try:
        float(cell.rstrip(" %"))
    except ValueError:
        return f"'{cell}"
    return cell
