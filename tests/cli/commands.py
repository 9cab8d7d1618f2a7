"""The command line in this process."""

from __future__ import annotations

import pytest

from normfree.cli.main import main


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    status = main(words)
    captured = capsys.readouterr()
    return status, captured.out, captured.err
