"""One self-contained page of runs, or of the heads of one model, with figures and tables as files. No torch."""

from normfree.report.build import build_report
from normfree.report.heads import build_heads_report, heads_of, heads_tables, verdict_sentences

__all__ = ["build_heads_report", "build_report", "heads_of", "heads_tables", "verdict_sentences"]
