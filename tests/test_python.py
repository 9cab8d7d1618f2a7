"""The examples of docs/python.md and README.md run in their order, and all that they name is at the top level."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import normfree

PAGES = [(Path(__file__).parents[1] / name).read_text() for name in ("docs/python.md", "README.md")]
CODE = "\n".join(re.findall(r"```python\n(.*?)```", "\n".join(PAGES), re.DOTALL))


def test_every_public_name_exists() -> None:
    for name in normfree.__all__:
        assert getattr(normfree, name) is not None
    assert set(normfree.__all__) == {*normfree._PUBLIC, "__version__"}
    modules = {path.stem for path in Path(normfree.__file__).parent.iterdir()}
    assert not modules & set(normfree.__all__), "`import normfree.train` would put a module in place of the function"


@pytest.mark.slow
def test_the_examples_of_the_pages_run(trained: Path, tiny: list[str], cache: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs" / "quick" / "sm-r-seed0")
    code = CODE.replace('"preset=cpu-quick"', ", ".join(map(repr, tiny)))
    code += "\nprint(repr(run), repr(measured), repr(probe.statistics()), sep=chr(10))\n"
    environment = {**os.environ, "NORMFREE_CACHE": str(cache), "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "Run runs/quick/sm-g-seed0: SM+G, seed 0, finished, perplexity" in finished.stdout
    assert len(re.findall(r"^ +layer +head +entropy_nats", finished.stdout, re.MULTILINE)) == 2
    for picture in ("heads.png", "curves.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
