"""One self-contained page of runs, with its figures and tables as files. Needs run folders only, no torch."""

from normfree.report.build import build_report

__all__ = ["build_report"]
