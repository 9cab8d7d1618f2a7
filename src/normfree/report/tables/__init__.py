"""Tables: pure functions from runs to `Table`, and from a `Table` to Markdown, LaTeX, CSV or HTML."""

from normfree.report.tables.claims import claim_table
from normfree.report.tables.cost import (
    cost_markdown,
    layer_cost_table,
    matmul_cost_table,
    operation_cost_table,
    trade_off_table,
)
from normfree.report.tables.heads import extreme_head_table, head_pair, layer_table, mover_table
from normfree.report.tables.history import gap_table, overload_table
from normfree.report.tables.results import difference_table, perplexity_table, range_table
from normfree.report.tables.runs import (
    has_negative_slope,
    has_slope,
    run_table,
    slope_table,
    verdict_table,
)
from normfree.report.tables.table import Column, Table, to_csv, to_html, to_latex, to_markdown
