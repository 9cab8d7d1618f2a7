"""Damage to the files of a run, or a full disk: it is reported, and a resume ends where the whole run ended."""

import errno
import json
import logging
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from normfree.data import prepare
from normfree.files import damages, read_manifest, sha256_file, write_manifest
from normfree.store.checkpoints import CheckpointError, checkpoints_in, newest_sound
from normfree.store.runs import METRICS_FILE, RunWriter, read_lines, read_run
from normfree.training.trainer import NormFreeTrainer
from tests.machine import largest_file
from tests.training.runs import DAMAGES, check_equal_runs, damage, losses, of_every_family

CHECKPOINT_FILES = ("config.json", "manifest.json", "model.safetensors", "modeling.py", "optimizer.pt", "rng_state.pth")
CORPUS_FILES = ("manifest.json", "tokenizer.json", "tokenizer_config.json", "train.arrow", "validation.arrow")


@pytest.fixture
def broken(trained: Path, tiny_folder: Path) -> Path:
    """A copy of the run as a kill after its last checkpoint leaves it, with checkpoints 4 and 6."""
    shutil.copytree(trained, tiny_folder)
    shutil.rmtree(tiny_folder / "model")
    RunWriter(tiny_folder, {**read_run(trained).facts, "status": "running", "final": None})
    return tiny_folder


@pytest.fixture
def resume(train_tiny: Callable, broken: Path, trained: Path) -> Callable[[], None]:
    """Resume the broken run and compare it with the whole one."""

    def check() -> None:
        train_tiny()
        check_equal_runs(broken, trained)

    return check


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_each_damaged_checkpoint_file_is_named(broken: Path, tiny_spec, name: str, how: str, caplog) -> None:
    damage(broken / "checkpoints" / "checkpoint-6" / name, how)
    with caplog.at_level(logging.WARNING, "normfree"):
        taken = newest_sound(broken / "checkpoints", spec=tiny_spec())
    assert taken == broken / "checkpoints" / "checkpoint-4"
    assert "rejected checkpoint-6" in caplog.text
    assert name in caplog.text


def test_an_unreadable_checkpoint_is_named(broken: Path, tiny_spec, caplog, monkeypatch) -> None:
    """A lost sector of the disk, or a stale NFS handle."""

    def hash_or_fail(path: Path) -> str:
        if path.name == "optimizer.pt" and path.parent.name == "checkpoint-6":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return sha256_file(path)

    monkeypatch.setattr("normfree.files.sha256_file", hash_or_fail)
    with caplog.at_level(logging.WARNING, "normfree"):
        assert newest_sound(broken / "checkpoints", spec=tiny_spec()) == broken / "checkpoints" / "checkpoint-4"
    assert "rejected checkpoint-6: optimizer.pt cannot be read (Input/output error)" in caplog.text


CORPUS_DAMAGES = [
    pytest.param("decoder", name, how, marks=pytest.mark.slow if how == "cut" else ())
    for name in CORPUS_FILES
    for how in DAMAGES
]


@pytest.mark.parametrize(
    ("family", "name", "how"),
    [*CORPUS_DAMAGES, *(("vision", name, "flip") for name in ("preprocessor_config.json", "validation.arrow"))],
    indirect=["family"],
)
def test_a_damaged_corpus_is_named_and_prepared_again(tmp_path, cache, tiny_spec, name, how, caplog) -> None:
    spec = tiny_spec().data
    sound = prepare(spec, cache=cache, progress=False)
    shutil.copytree(cache / "corpora", tmp_path / "corpora")
    damage(tmp_path / "corpora" / sound.folder.name / name, how)
    with caplog.at_level(logging.WARNING, "normfree"):
        again = prepare(spec, cache=tmp_path, progress=False)
    assert "is damaged and prepared again" in caplog.text
    assert name in caplog.text
    assert again.fingerprint == sound.fingerprint
    assert damages(again.folder) == []


def test_a_spec_that_cannot_be_read_is_refused(broken: Path, resume) -> None:
    path = broken / "run.json"
    facts = json.loads(path.read_text())
    facts["spec"]["pseset"] = facts["spec"].pop("preset")
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"run\.json holds a spec that this version cannot read .*move the file away"):
        resume()


@pytest.mark.parametrize("how", [*DAMAGES, "empty"])
def test_a_run_resumes_whatever_happened_to_run_json(broken: Path, resume, how: str, caplog) -> None:
    path = broken / "run.json"
    if how == "empty":
        path.write_text("{}")
    elif how == "flip":
        path.write_text(path.read_text().replace('"status": "running"', '"status": "sunning"'))
    else:
        damage(path, how)
    with caplog.at_level(logging.WARNING, "normfree"):
        resume()
    assert read_run(broken).facts["steps_done"] == 6
    assert (broken / "run.json.damaged").is_file() == ("run.json" in caplog.text) == (how != "remove")


@of_every_family
@pytest.mark.parametrize("how", DAMAGES)
def test_a_run_resumes_whatever_happened_to_its_metrics(broken, trained, train_tiny, how: str, caplog) -> None:
    path = broken / "metrics.jsonl"
    if how == "flip":
        path.write_text(path.read_text().replace("{", "z", 1))
    else:
        damage(path, how)
    with caplog.at_level(logging.WARNING, "normfree"):
        run = train_tiny()
    assert run.score == read_run(trained).score
    assert [step for step, _ in run.series("final", "entropy_nats")] == [6]
    assert ("metrics.jsonl" in caplog.text) == (how != "cut")
    if how == "flip":
        assert (broken / "metrics.jsonl.damaged").is_file()
        assert len(run.metrics) == len(read_run(trained).metrics) - 1


def test_training_time_survives_the_loss_of_run_json(broken: Path, train_tiny) -> None:
    checkpoint = broken / "checkpoints" / "checkpoint-6"
    facts = {key: value for key, value in read_manifest(checkpoint).items() if key not in ("files", "seal")}
    assert 0 < facts["wall_seconds"] < 1000
    write_manifest(checkpoint, facts | {"wall_seconds": 5000.0})
    (broken / "run.json").unlink()
    assert 5000 < train_tiny().facts["wall_seconds"] < 6000


@of_every_family
def test_half_written_files_of_a_kill_are_removed(broken: Path, resume) -> None:
    shutil.rmtree(broken / "checkpoints" / "checkpoint-6")
    for name in ("checkpoints/.staging/checkpoint-6", "checkpoints/.staging/checkpoint-5", ".model.tmp"):
        (broken / name).mkdir(parents=True)
        (broken / name / "model.safetensors").write_text("torn")
    (broken / ".run.json.99.tmp").write_text("torn")
    resume()
    assert not list(broken.rglob(".staging")) + list(broken.glob(".*.tmp"))


@of_every_family
def test_a_run_without_a_sound_checkpoint_starts_again(broken: Path, resume) -> None:
    for step in (4, 6):
        damage(broken / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt", "cut")
    resume()
    assert read_run(broken).facts["resumed"] == 0
    moved = sorted(path.name for path in (broken / "checkpoints" / "damaged").iterdir())
    assert moved == ["checkpoint-4", "checkpoint-6"]


def test_a_run_never_resumes_on_another_text(broken: Path, resume, tiny_spec, tmp_path: Path) -> None:
    text = Path(tiny_spec().data.paths[0]).parent
    shutil.copytree(text, tmp_path / "original")
    changed = text / "0.py"
    changed.write_text(changed.read_text().replace("self", "this"))
    try:
        with pytest.raises(ValueError, match=r"trained on corpus .*, but the text now gives .*tag="):
            resume()
    finally:
        shutil.copy2(tmp_path / "original" / "0.py", changed)


def test_a_run_resumes_in_smaller_passes_with_a_warning(broken, trained, train_tiny, caplog, monkeypatch) -> None:
    monkeypatch.setattr("normfree.training.machine.model_code", lambda: "another")
    words = "train.micro_batch_sequences=2", "train.gradient_checkpointing=true", "train.evaluate_every=1"
    resumed, uninterrupted = train_tiny(*words), read_run(trained)
    assert resumed.perplexity == pytest.approx(uninterrupted.perplexity, rel=1e-5)
    assert losses(resumed) == pytest.approx(losses(uninterrupted), rel=1e-5)
    assert "micro_batch_sequences was 8, now 2; gradient_checkpointing was False, now True" in caplog.text
    assert "now another" in caplog.text


def test_a_checkpoint_needs_no_trust(trained: Path) -> None:
    """Every torch file loads with weights_only=True, and Trainer's pickle of its arguments is not kept."""
    checkpoint = trained / "checkpoints" / "checkpoint-6"
    for name in ("optimizer.pt", "scheduler.pt"):
        assert isinstance(torch.load(checkpoint / name, weights_only=True), dict)
    from transformers.trainer_pt_utils import safe_globals

    with safe_globals():  # numpy's random state; what Trainer itself allows
        assert torch.load(checkpoint / "rng_state.pth", weights_only=True)["cpu"].numel() > 0
    assert not list(trained.rglob("training_args.bin"))


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
    (older,) = checkpoints_in(tiny_folder / "checkpoints")
    assert (older.name, damages(older)) == ("checkpoint-2", [])
    assert not (tiny_folder / "checkpoints" / ".staging").exists()
    assert max(line["step"] for line in read_lines(tiny_folder / METRICS_FILE) if line["name"] == "loss") == 4
    train_tiny()
    check_equal_runs(tiny_folder, trained)
