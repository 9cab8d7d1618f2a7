"""The notebooks of docs/ run, show what they promise, and hold nothing of the machine that made their outputs."""

import json
import re
import sys
from pathlib import Path

import pytest

from docs.execute import NOTEBOOKS, execute, without_progress
from docs.hooks import notebook_page

FIGURES = {"measure_a_model": 2, "study_end_to_end": 2}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_complete_and_of_no_machine(path: Path) -> None:
    page = notebook_page(json.loads(path.read_text()))
    assert len(page) < 500_000
    text = re.sub(r"data:image/png;base64,[^)]*", "", page)
    assert not [word for word in ("/root", "/home", "/tmp", "/work", "site-packages", "Warning") if word in text]
    assert page.count("](data:image/png") == FIGURES[path.stem]
    assert "<table" in page


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_its_figures(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "cache"))
    page = notebook_page(without_progress(execute(path, tmp_path)))
    assert page.count("](data:image/png") == FIGURES[path.stem]
    assert "Warning" not in page


def test_without_its_extra_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "nbclient", None)
    with pytest.raises(ImportError, match=r"need their extra: .venv/bin/pip install -e '.\[notebooks\]'"):
        execute(NOTEBOOKS[0], tmp_path)
