"""One report for all tests here: four variants, seeds, a divergence, slopes, an interrupted run."""

from pathlib import Path

import pytest

from normfree.report import build_report
from tests.synthetic import write_run


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished report, read-only."""
    root = tmp_path_factory.mktemp("report")
    runs = [write_run(root / "runs", label) for label in ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")]
    runs += [write_run(root / "runs", label, seed=1) for label in ("SM+G", "SM+R")]
    runs += [write_run(root / "runs", "SM", status="diverged", broken_probe=True)]
    runs += [write_run(root / "runs", "SM+LN+G", seed=1, status="interrupted")]
    runs += [write_run(root / "runs", "SM+leaky, per layer")]
    return build_report(runs, root / "out").parent
