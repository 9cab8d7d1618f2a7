from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from normfree.spec.run import RunSpec, TrainSpec
from normfree.store.checkpoints import STAGING, checkpoints_in, newest_sound, publish

SPEC = RunSpec(preset="cpu", variant="sm-r", label="SM+R", train=TrainSpec(steps=10))


def stage(folder: Path, step: int) -> None:
    staged = folder / STAGING / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(bytes([step % 256]) * 100)
    (staged / "optimizer.pt").write_bytes(b"adam")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (5, 10, 100):
        stage(tmp_path, step)
        publish(tmp_path, step, {"spec": SPEC.to_dict()}, keep=3)
    return tmp_path


def test_the_newest_by_step_is_taken(folder: Path) -> None:
    assert newest_sound(folder, spec=SPEC) == folder / "checkpoint-100"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_newest_is_named_set_aside_and_the_older_one_taken(
    folder: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "checkpoint-100" / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    with caplog.at_level(logging.WARNING, "normfree"):
        assert newest_sound(folder, spec=SPEC) == folder / "checkpoint-10"
    assert "checkpoint-100" in caplog.text
    assert name in caplog.text
    assert (folder / "damaged" / "checkpoint-100").is_dir()
    assert newest_sound(folder, spec=SPEC) == folder / "checkpoint-10"


def test_a_checkpoint_of_another_spec_is_not_taken(folder: Path) -> None:
    assert newest_sound(folder, spec=replace(SPEC, seed=1)) is None
    assert len(list((folder / "damaged").iterdir())) == 3


def test_a_checkpoint_from_before_a_field_of_the_spec_existed_is_taken(folder: Path) -> None:
    older = SPEC.to_dict()
    del older["train"]["compile"], older["data_seed"]
    stage(folder, 200)
    publish(folder, 200, {"spec": older}, keep=3)
    assert newest_sound(folder, spec=replace(SPEC, data_seed=1)) is None
    stage(folder, 300)
    publish(folder, 300, {"spec": older}, keep=3)
    assert newest_sound(folder, spec=SPEC) == folder / "checkpoint-300"


def test_rotation_keeps_the_newest(folder: Path) -> None:
    stage(folder, 200)
    publish(folder, 200, {"spec": SPEC.to_dict()}, keep=2)
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-200", "checkpoint-100"]


def test_a_half_written_checkpoint_is_no_checkpoint(folder: Path) -> None:
    stage(folder, 300)
    assert newest_sound(folder, spec=SPEC) == folder / "checkpoint-100"


def test_set_aside_twice_keeps_both(folder: Path) -> None:
    (folder / "checkpoint-100" / "optimizer.pt").unlink()
    newest_sound(folder, spec=SPEC)
    stage(folder, 100)
    publish(folder, 100, {"spec": SPEC.to_dict()}, keep=3)
    (folder / "checkpoint-100" / "optimizer.pt").unlink()
    newest_sound(folder, spec=SPEC)
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == [
        "checkpoint-100",
        "checkpoint-100.2",
    ]
