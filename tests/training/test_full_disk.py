"""A disk that fills up, or a file that may not grow, in the middle of a write."""

import resource
from pathlib import Path

import pytest

from normfree.files import damages
from normfree.store.checkpoints import CheckpointError, checkpoints_in
from normfree.store.runs import METRICS_FILE, RunWriter, read_lines, read_run
from normfree.training.trainer import NormFreeTrainer
from tests.machine import largest_file
from tests.training.runs import check_equal_runs


def check_older_files(folder: Path) -> None:
    """Checkpoint 2 and the metrics of step 4 survived the failed save of step 4."""
    checkpoints = checkpoints_in(folder / "checkpoints")
    assert checkpoints[0].name == "checkpoint-2"
    assert not any(damages(checkpoint) for checkpoint in checkpoints)
    assert not (folder / "checkpoints" / ".staging").exists()
    assert max(line["step"] for line in read_lines(folder / METRICS_FILE) if line["name"] == "loss") == 4


def test_a_failed_save_leaves_older_files_and_the_run_resumes(train_tiny, tiny_folder, trained, monkeypatch) -> None:
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
