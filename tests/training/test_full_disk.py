"""A disk that fills up, or a file that may not grow, in the middle of a write."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from normfree.files import damages
from normfree.store.checkpoints import CheckpointError, checkpoints_in
from normfree.store.runs import METRICS_FILE, RunWriter, read_lines, read_run
from normfree.training.trainer import NormFreeTrainer
from tests.training.runs import act_in, check_equal_runs


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system then answers EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_older_files(folder: Path) -> None:
    """Checkpoint 2 and the metrics of step 4 survived the failed save of step 4."""
    checkpoints = checkpoints_in(folder / "checkpoints")
    assert checkpoints[0].name == "checkpoint-2"
    assert not any(damages(checkpoint) for checkpoint in checkpoints)
    assert not (folder / "checkpoints" / ".staging").exists()
    assert max(line["step"] for line in read_lines(folder / METRICS_FILE) if line["name"] == "loss") == 4


def test_a_failed_save_leaves_older_files_and_the_run_resumes(
    train_tiny, tiny_folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_optimizer = NormFreeTrainer._save_optimizer_and_scheduler

    def save(trainer: NormFreeTrainer, folder: str | None) -> None:
        with largest_file(200_000 if trainer.state.global_step == 4 else resource.RLIM_INFINITY):
            save_optimizer(trainer, folder)

    with monkeypatch.context() as patch:
        patch.setattr(NormFreeTrainer, "_save_optimizer_and_scheduler", save)
        with pytest.raises(CheckpointError, match=r"step 4 failed .*older ones are unchanged") as failed:
            train_tiny()
    assert "\n" not in str(failed.value)
    assert read_run(tiny_folder).status == "failed"
    assert "CheckpointError" in read_run(tiny_folder).facts["error"]
    check_older_files(tiny_folder)
    train_tiny()
    check_equal_runs(tiny_folder, trained)


@pytest.mark.parametrize("room", [0, 1, 40, 5000])
def test_a_metrics_file_that_may_not_grow_stays_unchanged(tmp_path: Path, room: int) -> None:
    writer = RunWriter(tmp_path, {"spec": {}})
    writer.log(1, "train", [("loss", 2.0)])
    path = tmp_path / METRICS_FILE
    before = path.read_bytes()
    long_line = ("entropy_nats", list(range(3000)))
    with largest_file(len(before) + room), pytest.raises(OSError, match="File too large"):
        writer.log(2, "probe", [long_line])
    assert path.read_bytes() == before
    writer.log(2, "probe", [long_line])
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_a_run_too_large_for_the_disk_is_refused(train_tiny, tiny_folder: Path) -> None:
    huge = ("model.hidden_size=65536", "model.num_hidden_layers=200", "model.num_attention_heads=512")
    with pytest.raises(OSError, match=r"MiB free, but 6 more checkpoints need [\d,]+ MiB: free space"):
        train_tiny(*huge, "train.checkpoints_kept=5")
    assert not (tiny_folder / "run.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB in memory, where `train_tiny` trains."""
    place = tmp_path / "runs"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"this test mounts a small tmpfs, which needs root: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill_in(method: str, step: int, disk: Path, monkeypatch: pytest.MonkeyPatch, *, leave: int) -> None:
    """Fill the disk but for `leave` bytes before that method of the trainer is called after `step`."""

    def fill(trainer: NormFreeTrainer) -> None:
        if trainer.state.global_step == step:
            with (disk / "filler").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - leave)

    act_in(method, fill, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("leave", [0, 4096, 100_000, 300_000])
def test_a_disk_that_fills_during_a_save_loses_nothing(
    small_disk: Path, train_tiny, tiny_folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, leave: int
) -> None:
    with monkeypatch.context() as patch:
        fill_in("_save_optimizer_and_scheduler", 4, small_disk, patch, leave=leave)
        with pytest.raises(CheckpointError, match="step 4"):
            train_tiny("train.checkpoints_kept=1")
    check_older_files(tiny_folder)
    (small_disk / "filler").unlink()
    train_tiny("train.checkpoints_kept=1")
    check_equal_runs(tiny_folder, trained)


@pytest.mark.slow
def test_each_save_checks_the_free_space(small_disk: Path, train_tiny, tiny_folder: Path, monkeypatch) -> None:
    fill_in("_save_checkpoint", 4, small_disk, monkeypatch, leave=2**20)
    with pytest.raises(CheckpointError, match=r"step 4 failed .*1 MiB free, but 1 more checkpoints need"):
        train_tiny("train.checkpoints_kept=1")
    check_older_files(tiny_folder)


@pytest.mark.slow
def test_metrics_on_a_full_disk_stay_whole(small_disk: Path, train_tiny, tiny_folder: Path, monkeypatch) -> None:
    fill_in("training_step", 5, small_disk, monkeypatch, leave=0)
    with pytest.raises(OSError, match=r"No space left|checkpoint of step 8 failed"):
        train_tiny("train.checkpoints_kept=1", "train.checkpoint_every=4", "train.steps=8")
    assert not damages(tiny_folder / "checkpoints" / "checkpoint-4")
    raw = (tiny_folder / METRICS_FILE).read_bytes()
    assert raw.endswith(b"}\n")
    assert len(list(read_lines(tiny_folder / METRICS_FILE))) == raw.count(b"\n")
    assert read_run(tiny_folder).facts["steps_done"] == 4
