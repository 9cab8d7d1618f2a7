"""What a study says that it will cost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from normfree.cost.training import describe_training_cost, training_flops
from normfree.spec.study import load_study

RESULTS = Path(__file__).parents[2] / "results"
WEIGHTS = {"paper-gpt2": 12 * 12 * 768**2 + 768 * 50257, "paper-pythia": 6 * 12 * 512**2 + 512 * 50257}
ATTENTION = {"paper-gpt2": 12 * 12 * 768 * 128, "paper-pythia": 12 * 6 * 512 * 128}


@pytest.mark.parametrize(("name", "hours"), [("paper-gpt2", "4.5"), ("paper-pythia", "1.6")])
def test_a_paper_study_states_its_gpu_hours(name: str, hours: str) -> None:
    study = load_study(name)
    jobs = study.jobs()
    for job in jobs:
        assert training_flops(job.spec, 10) == pytest.approx(10 * (6 * WEIGHTS[name] + ATTENTION[name]), rel=1e-12)
    line = describe_training_cost(jobs, study.tokens_per_epoch)
    assert line.startswith("4 runs, 8,550.4 M tokens, ")
    assert f"; {hours} GPU-hours at 40% of an H100's bf16 peak (989 TFLOP/s)" in line
    assert describe_training_cost(jobs) == (
        "4 runs; they count epochs, whose tokens are unknown until the corpus is prepared"
    )


def test_a_cpu_study_states_a_time_from_records_only(tmp_path: Path) -> None:
    jobs = load_study("quick").jobs({"runs_dir": str(tmp_path)})
    line = describe_training_cost(jobs)
    assert line.startswith("4 runs, 4.9 M tokens, ")
    assert "hours" not in line
    assert "left" not in line
    shutil.copytree(RESULTS / "quick" / "sm-g-seed0", tmp_path / "quick" / "sm-g-seed0")
    assert "min" in describe_training_cost(jobs).partition("; ")[2]
