"""What needs processes of its own: two ranks on the CPU, and trackers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from normfree.records import Run, read_run


def run_command(words: list[str], folder: Path) -> None:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def entropies(run: Run) -> list[list[float]]:
    return run.last("final", "entropy_nats") or []


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one_and_only_the_first_writes(
    tiny: list[str], cache: Path, tmp_path: Path
) -> None:
    words = ["train", *tiny, "variant=sm-r", "train.micro_batch_sequences=4", f"cache_dir={cache}"]
    run_command(["-m", "normfree.cli", *words, "runs_dir=one"], tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "normfree.cli"]
    run_command([*torchrun, *words, "runs_dir=two"], tmp_path)
    one, two = (read_run(tmp_path / name / "single" / "sm-r-seed0") for name in ("one", "two"))
    assert two.perplexity == pytest.approx(one.perplexity, rel=1e-4)
    assert one.facts["final"]["tokens"] == two.facts["final"]["tokens"]
    for mine, theirs in zip(entropies(one), entropies(two), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert one.last("final", "rows") == two.last("final", "rows")
    for run in (one, two):
        steps = [step for step, _ in run.series("train", "loss")]
        assert steps == [1, 2, 3, 4, 5, 6]
    for (_, mine), (_, theirs) in zip(one.series("train", "loss"), two.series("train", "loss"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_trackers_get_the_loss_offline(
    tiny: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["train", *tiny, "variant=sm-r", "train.trackers=[tensorboard,wandb,trackio]", f"cache_dir={cache}"]
    run_command(["-m", "normfree.cli", *words], tmp_path)
    assert list((tmp_path / "runs/single/sm-r-seed0/tensorboard").rglob("events.out.tfevents.*"))
    assert list(tmp_path.rglob("*.wandb"))
    assert list((tmp_path / "trackio").rglob("*.db"))
    assert read_run(tmp_path / "runs" / "single" / "sm-r-seed0").status == "finished"
