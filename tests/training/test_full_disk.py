"""A disk that is full, or a file that may not grow, in the middle of what is being written."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from normfree.files import damages
from normfree.spec.run import RunSpec
from normfree.store.checkpoints import CheckpointError, checkpoints_in
from normfree.store.runs import METRICS_FILE, RunWriter, read_lines, read_run
from normfree.training import train
from normfree.training.trainer import NormFreeTrainer

Build = Callable[..., RunSpec]
SAVE_OPTIMIZER = NormFreeTrainer._save_optimizer_and_scheduler
SAVE = NormFreeTrainer._save_checkpoint


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system then answers EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def whole_weights(tmp_path: Path, cache: Path, spec: RunSpec) -> dict[str, torch.Tensor]:
    folder = train(spec, runs_dir=tmp_path / "whole", cache=cache, progress=False)
    return load_file(folder / "model" / "model.safetensors")


def check_that_nothing_older_is_lost(folder: Path, checkpoint_step: int, metrics_until: int) -> None:
    checkpoints = checkpoints_in(folder / "checkpoints")
    assert checkpoints[0].name == f"checkpoint-{checkpoint_step}"
    assert not any(damages(checkpoint) for checkpoint in checkpoints)
    assert not (folder / "checkpoints" / ".staging").exists()
    steps = [line["step"] for line in read_lines(folder / METRICS_FILE) if line["name"] == "loss"]
    assert max(steps) == metrics_until


def check_that_the_run_can_go_on(folder: Path, cache: Path, spec: RunSpec, expected: dict[str, torch.Tensor]) -> None:
    train(spec, runs_dir=folder.parents[1], cache=cache, progress=False)
    found = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_run(folder).status == "finished"


def test_a_checkpoint_that_may_not_grow_leaves_the_older_one_and_the_metrics(
    tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec()
    expected = whole_weights(tmp_path, cache, spec)

    def save(trainer: NormFreeTrainer, folder: Any) -> None:
        with largest_file(200_000 if trainer.state.global_step == 4 else resource.RLIM_INFINITY):
            SAVE_OPTIMIZER(trainer, folder)

    monkeypatch.setattr(NormFreeTrainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(CheckpointError, match=r"step 4 could not be written .*older ones are untouched") as failed:
        train(spec, runs_dir=tmp_path / "broken", cache=cache, progress=False)
    assert "\n" not in str(failed.value)
    folder = tmp_path / "broken" / "single" / spec.name
    assert read_run(folder).status == "failed"
    assert "CheckpointError" in read_run(folder).facts["error"]
    check_that_nothing_older_is_lost(folder, 2, 4)
    monkeypatch.undo()
    check_that_the_run_can_go_on(folder, cache, spec, expected)


@pytest.mark.parametrize("room", [0, 1, 40, 5000])
def test_a_metrics_file_that_may_not_grow_stays_as_it_was(tmp_path: Path, room: int) -> None:
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


def test_a_run_that_cannot_fit_the_disk_is_refused_before_it_begins(
    tmp_path: Path, cache: Path, tiny_spec: Build
) -> None:
    huge = ("model.hidden_size=65536", "model.num_hidden_layers=200", "model.num_attention_heads=512")
    spec = tiny_spec(*huge, "train.checkpoints_kept=5")
    with pytest.raises(OSError, match=r"MiB free, and a run with 6 more checkpoints takes about [\d,]+ MiB: make room"):
        train(spec, runs_dir=tmp_path, cache=cache, progress=False)
    assert not list(tmp_path.rglob("run.json"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB in memory."""
    place = tmp_path / "disk"
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


def fill(disk: Path, *, leave: int) -> None:
    size = shutil.disk_usage(disk).free - leave
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


@pytest.mark.slow
@pytest.mark.parametrize("leave", [0, 4096, 100_000, 300_000])
def test_a_disk_that_fills_up_inside_a_save_loses_nothing_older(
    small_disk: Path, tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch, leave: int
) -> None:
    spec = tiny_spec("train.checkpoints_kept=1")
    expected = whole_weights(tmp_path, cache, spec)

    def save(trainer: NormFreeTrainer, folder: Any) -> None:
        if trainer.state.global_step == 4:
            fill(small_disk, leave=leave)
        SAVE_OPTIMIZER(trainer, folder)

    monkeypatch.setattr(NormFreeTrainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(CheckpointError, match="step 4"):
        train(spec, runs_dir=small_disk, cache=cache, progress=False)
    monkeypatch.undo()
    folder = small_disk / "single" / spec.name
    check_that_nothing_older_is_lost(folder, 2, 4)
    (small_disk / "filler").unlink()
    check_that_the_run_can_go_on(folder, cache, spec, expected)


@pytest.mark.slow
def test_space_is_looked_for_before_each_save(
    small_disk: Path, tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec("train.checkpoints_kept=1")

    def save(trainer: NormFreeTrainer, model: Any, trial: Any) -> None:
        if trainer.state.global_step == 4:
            fill(small_disk, leave=2**20)
        SAVE(trainer, model, trial)

    monkeypatch.setattr(NormFreeTrainer, "_save_checkpoint", save)
    with pytest.raises(
        CheckpointError, match=r"step 4 could not be written .*1 MiB free, and a checkpoint takes about"
    ):
        train(spec, runs_dir=small_disk, cache=cache, progress=False)
    check_that_nothing_older_is_lost(small_disk / "single" / spec.name, 2, 4)


@pytest.mark.slow
def test_metrics_on_a_full_disk_stay_whole(
    small_disk: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec("train.checkpoints_kept=1", "train.checkpoint_every=4", "train.steps=8")
    step = NormFreeTrainer.training_step

    def training_step(trainer: NormFreeTrainer, *rest: Any, **named: Any) -> torch.Tensor:
        if trainer.state.global_step == 5:
            fill(small_disk, leave=0)
        return step(trainer, *rest, **named)

    monkeypatch.setattr(NormFreeTrainer, "training_step", training_step)
    with pytest.raises(OSError, match=r"No space left|could not be written"):
        train(spec, runs_dir=small_disk, cache=cache, progress=False)
    folder = small_disk / "single" / spec.name
    assert not damages(folder / "checkpoints" / "checkpoint-4")
    raw = (folder / METRICS_FILE).read_bytes()
    assert raw.endswith(b"}\n")
    assert len(list(read_lines(folder / METRICS_FILE))) == raw.count(b"\n")
    assert read_run(folder).facts["steps_done"] == 4
