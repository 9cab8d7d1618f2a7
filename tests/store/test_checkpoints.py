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
    (staged / "config.json").write_text("{}")
    (staged / "optimizer.pt").write_bytes(b"adam")


def save(folder: Path, step: int, *, spec: dict | None = None, keep: int = 3) -> None:
    stage(folder, step)
    publish(folder, step, {"spec": spec or SPEC.to_dict()}, keep=keep)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (5, 10, 100):
        save(tmp_path, step)
    return tmp_path


def test_the_newest_published_checkpoint_of_the_spec_is_taken(folder: Path) -> None:
    stage(folder, 300)
    assert newest_sound(folder, spec=SPEC) == folder / "checkpoint-100"
    save(folder, 200, keep=2)
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-200", "checkpoint-100"]
    assert newest_sound(folder, spec=replace(SPEC, seed=1)) is None
    assert len(list((folder / "damaged").iterdir())) == 2


def test_missing_fields_of_an_older_spec_have_defaults(folder: Path) -> None:
    older = SPEC.to_dict()
    del older["train"]["compile"], older["data_seed"]
    save(folder, 200, spec=older)
    assert newest_sound(folder, spec=replace(SPEC, data_seed=1)) is None
    save(folder, 300, spec=older)
    assert newest_sound(folder, spec=SPEC) == folder / "checkpoint-300"


def test_a_checkpoint_set_aside_twice_keeps_both(folder: Path) -> None:
    for _ in range(2):
        (folder / "checkpoint-100" / "optimizer.pt").unlink()
        newest_sound(folder, spec=SPEC)
        save(folder, 100)
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["checkpoint-100", "checkpoint-100.2"]
