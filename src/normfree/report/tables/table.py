"""A table of text cells, and functions that write it as Markdown, LaTeX, CSV or HTML and escape its text."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from jinja2 import Template

_LATEX = str.maketrans(
    {mark: "\\" + mark for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)
_MARKDOWN = str.maketrans(
    {mark: "\\" + mark for mark in "\\`*_[]|~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ", "\r": " "}
)
_HTML = Template(
    Path(__file__).with_name("table.html.j2").read_text(encoding="utf-8"), autoescape=True, trim_blocks=True
)


@dataclass(frozen=True)
class Table:
    """Rows of finished text. The first cell of a row names the row."""

    name: str  # name of its files
    caption: str
    titles: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()
    words: tuple[str, ...] = ()  # Titles of columns of words, beside the first. They are aligned left, numbers right.

    @property
    def is_numeric(self) -> list[bool]:
        """Whether each column holds numbers."""
        return [number > 0 and title not in self.words for number, title in enumerate(self.titles)]


def without_empty_columns(table: Table) -> Table:
    """The table without columns in which every cell is a dash."""
    filled = [i for i in range(len(table.titles)) if i == 0 or any(row[i] not in ("-", "") for row in table.rows)]
    titles, *rows = (tuple(row[i] for i in filled) for row in (table.titles, *table.rows))
    return replace(table, titles=titles, rows=rows)


def to_markdown(table: Table) -> str:
    """GitHub's pipe table, with the caption above and the notes below."""
    titles, *rows = ([cell.translate(_MARKDOWN) for cell in row] for row in (table.titles, *table.rows))
    rules = ["---:" if is_numeric else "---" for is_numeric in table.is_numeric]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rules, *rows))
    notes = "\n".join(f"- {note.translate(_MARKDOWN)}" for note in table.notes)
    parts = (f"**{table.caption.translate(_MARKDOWN)}**", lines, notes)
    return ("\n\n".join(filter(None, parts)) + "\n").replace("+-", "\N{PLUS-MINUS SIGN}")


def to_latex(table: Table) -> str:
    """A booktabs table."""
    layout = "".join("r" if is_numeric else "l" for is_numeric in table.is_numeric)
    cells = ([cell.translate(_LATEX) for cell in row] for row in (table.titles, *table.rows))
    titles, *rows = (" & ".join(row) + r" \\" for row in cells)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{table.caption.translate(_LATEX)}}}"]
    lines += [rf"\label{{tab:{table.name}}}", rf"\begin{{tabular}}{{{layout}}}"]
    lines += [r"\toprule", titles, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\smallskip\footnotesize {note.translate(_LATEX)}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}", ""]).replace("+-", r"$\pm$")


def to_csv(table: Table) -> str:
    """Comma-separated cells below a header line, without caption and notes."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([table.titles, *table.rows])
    return file.getvalue()


def to_html(table: Table) -> str:
    """A `<table>` with caption, scopes, notes, and links that contain its CSV and LaTeX."""
    links = {"csv": quote(to_csv(table)), "tex": quote(to_latex(table))}
    return _HTML.render(table=table, links=links).replace("+-", "\N{PLUS-MINUS SIGN}")
