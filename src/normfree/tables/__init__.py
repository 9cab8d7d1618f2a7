"""Tables: pure functions from runs to `Table`, and from a `Table` to Markdown, LaTeX, CSV or HTML."""

from normfree.tables.results import difference_table, perplexity_table, range_table
from normfree.tables.runs import (
    has_slope,
    is_leaky,
    run_table,
    slope_table,
    verdict_table,
)
from normfree.tables.table import Column, Table, to_csv, to_html, to_latex, to_markdown

__all__ = [
    "Column",
    "Table",
    "difference_table",
    "has_slope",
    "is_leaky",
    "perplexity_table",
    "range_table",
    "run_table",
    "slope_table",
    "to_csv",
    "to_html",
    "to_latex",
    "to_markdown",
    "verdict_table",
]
