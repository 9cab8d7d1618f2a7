"""Tables: pure functions from runs to `Table`, and from a `Table` to Markdown, LaTeX, CSV or HTML."""
