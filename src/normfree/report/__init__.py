"""One self-contained page of runs and measured models, with figures and tables as files. No torch."""

from normfree.report.build import build_report
