"""Tables: pure functions from runs to `Table`, and from a `Table` to Markdown, LaTeX, CSV or HTML."""

from normfree.tables.claims import claim_table
from normfree.tables.heads import extreme_head_table, head_pair, layer_table, mover_table
from normfree.tables.history import gap_table, overload_table
from normfree.tables.results import difference_table, perplexity_table, range_table
from normfree.tables.runs import (
    has_negative_slope,
    has_slope,
    run_table,
    slope_table,
    verdict_table,
)
from normfree.tables.table import Column, Table, to_csv, to_html, to_latex, to_markdown
