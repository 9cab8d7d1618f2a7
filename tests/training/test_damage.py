"""Damage to the files of a real run: each is refused by name, and a resume ends where the whole run ended."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from normfree.data import prepare
from normfree.files import damages, read_manifest, sha256_file, write_manifest
from normfree.spec.compose import compose_run
from normfree.spec.run import RunSpec
from normfree.store.checkpoints import compare_surroundings, newest_sound
from normfree.store.runs import RunWriter, read_run
from normfree.training import train

Build = Callable[..., RunSpec]

CHECKPOINT_FILES = (
    "activations.py",
    "attention.py",
    "config.json",
    "configuration.py",
    "generation_config.json",
    "loss.py",
    "manifest.json",
    "model.safetensors",
    "modeling.py",
    "norms.py",
    "optimizer.pt",
    "positions.py",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
)
CORPUS_FILES = ("manifest.json", "tokenizer.json", "tokenizer_config.json", "train.arrow", "validation.arrow")
DAMAGES = ("flip", "cut", "remove")


def harm(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "remove":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-2])  # more than the newline at the end
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path, tiny: list[str]) -> Path:
    """An uninterrupted run with checkpoints 4 and 6."""
    spec = compose_run([*tiny, "variant=sm-r"]).spec
    return train(spec, runs_dir=tmp_path_factory.mktemp("whole"), cache=cache, progress=False)


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run as a kill after its last checkpoint leaves it."""
    folder = tmp_path / "runs" / "single" / whole.name
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    RunWriter(folder, {**read_run(whole).facts, "status": "running", "final": None})
    return folder


def resume(folder: Path, cache: Path, spec: RunSpec) -> None:
    assert train(spec, runs_dir=folder.parents[1], cache=cache, progress=False) == folder


def same_result(folder: Path, whole: Path) -> bool:
    one, other = (load_file(run / "model" / "model.safetensors") for run in (folder, whole))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_these_are_the_files_of_a_checkpoint_and_of_a_corpus(whole: Path, cache: Path, tiny_spec: Build) -> None:
    assert sorted(path.name for path in (whole / "checkpoints" / "checkpoint-6").iterdir()) == list(CHECKPOINT_FILES)
    corpus = prepare(tiny_spec().data, cache=cache, progress=False).folder
    assert sorted(path.name for path in corpus.iterdir()) == list(CORPUS_FILES)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_each_damaged_file_of_a_checkpoint_is_refused_by_name_and_the_older_one_taken(
    broken: Path, tiny_spec: Build, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    harm(broken / "checkpoints" / "checkpoint-6" / name, how)
    with caplog.at_level(logging.WARNING, "normfree"):
        taken = newest_sound(broken / "checkpoints", spec=tiny_spec())
    assert taken == broken / "checkpoints" / "checkpoint-4"
    assert "rejected checkpoint-6" in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize("movable", [True, False])
def test_a_checkpoint_that_cannot_be_read_is_named_and_the_older_one_taken(
    broken: Path, tiny_spec: Build, movable: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sector that the disk has lost, a file handle that NFS no longer knows."""

    def hash_or_fail(path: Path) -> str:
        if path.name == "optimizer.pt" and path.parent.name == "checkpoint-6":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return sha256_file(path)

    monkeypatch.setattr("normfree.files.sha256_file", hash_or_fail)
    if not movable:
        monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    with caplog.at_level(logging.WARNING, "normfree"):
        assert newest_sound(broken / "checkpoints", spec=tiny_spec()) == broken / "checkpoints" / "checkpoint-4"
    assert "rejected checkpoint-6: optimizer.pt cannot be read (Input/output error)" in caplog.text
    assert ("could not be moved away" in caplog.text) is not movable


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(
    tmp_path: Path, cache: Path, tiny_spec: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def keep_checkpoints(path: Path, *rest: Any, **named: Any) -> None:
        if Path(path).parent.name == "checkpoints" and Path(path).name == "checkpoint-2":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        remove(path, *rest, **named)

    monkeypatch.setattr(shutil, "rmtree", keep_checkpoints)
    with caplog.at_level(logging.WARNING, "normfree"):
        folder = train(tiny_spec("train.checkpoints_kept=1"), runs_dir=tmp_path, cache=cache, progress=False)
    assert read_run(folder).status == "finished"
    assert "checkpoint-2 could not be removed" in caplog.text
    assert not (folder / "checkpoints" / "checkpoint-4").exists()


def test_no_flipped_byte_of_a_manifest_goes_unnoticed_unless_it_means_the_same(broken: Path) -> None:
    checkpoint = broken / "checkpoints" / "checkpoint-6"
    path = checkpoint / "manifest.json"
    content, meaning = path.read_bytes(), read_manifest(checkpoint)
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert damages(checkpoint) or read_manifest(checkpoint) == meaning
    path.write_bytes(content)
    assert damages(checkpoint) == []


CORPUS_DAMAGES = [
    pytest.param(name, how, marks=pytest.mark.slow if how == "cut" else ()) for name in CORPUS_FILES for how in DAMAGES
]


@pytest.mark.parametrize(("name", "how"), CORPUS_DAMAGES)
def test_each_damaged_file_of_a_corpus_is_named_and_the_corpus_prepared_again(
    tmp_path: Path, cache: Path, tiny_spec: Build, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = tiny_spec().data
    sound = prepare(spec, cache=cache, progress=False)
    shutil.copytree(cache / "corpora", tmp_path / "corpora")
    harm(tmp_path / "corpora" / sound.folder.name / name, how)
    with caplog.at_level(logging.WARNING, "normfree"):
        again = prepare(spec, cache=tmp_path, progress=False)
    assert name in caplog.text
    assert again.fingerprint == sound.fingerprint
    assert damages(again.folder) == []


def test_a_spec_that_cannot_be_read_is_refused_with_its_place(broken: Path, cache: Path, tiny_spec: Build) -> None:
    path = broken / "run.json"
    facts = json.loads(path.read_text())
    facts["spec"]["pseset"] = facts["spec"].pop("preset")
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"run\.json holds a spec that this version cannot read .*move the file away"):
        resume(broken, cache, tiny_spec())


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_run_resumes_from_its_checkpoints_whatever_happened_to_its_records(
    broken: Path, whole: Path, cache: Path, tiny_spec: Build, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "flip":
        path = broken / name
        path.write_text(path.read_text().replace('"status": "running"', '"status": "sunning"').replace("{", "z", 1))
    else:
        harm(broken / name, how)
    with caplog.at_level(logging.WARNING, "normfree"):
        resume(broken, cache, tiny_spec())
    run = read_run(broken)
    assert run.status == "finished"
    assert same_result(broken, whole)
    assert run.facts["steps_done"] == 6
    steps = [step for step, _ in run.series("final", "entropy_nats")]
    assert steps == [6]
    if not (name == "run.json" and how == "remove") and not (name == "metrics.jsonl" and how == "cut"):
        assert name in caplog.text
    if name == "run.json" and how != "remove":
        assert (broken / "run.json.damaged").is_file()
    if name == "metrics.jsonl" and how == "flip":
        assert (broken / "metrics.jsonl.damaged").is_file()
        assert len(run.metrics) == len(read_run(whole).metrics) - 1


def test_a_run_json_that_says_nothing_is_a_damaged_one(
    broken: Path, whole: Path, cache: Path, tiny_spec: Build
) -> None:
    (broken / "run.json").write_text("{}")
    resume(broken, cache, tiny_spec())
    assert same_result(broken, whole)
    assert (broken / "run.json.damaged").read_text() == "{}"


def test_the_time_trained_survives_the_loss_of_run_json(broken: Path, cache: Path, tiny_spec: Build) -> None:
    checkpoint = broken / "checkpoints" / "checkpoint-6"
    facts = {key: value for key, value in read_manifest(checkpoint).items() if key not in ("files", "seal")}
    assert 0 < facts["wall_seconds"] < 1000
    write_manifest(checkpoint, facts | {"wall_seconds": 5000.0})
    (broken / "run.json").unlink()
    resume(broken, cache, tiny_spec())
    assert 5000 < read_run(broken).facts["wall_seconds"] < 6000


def test_after_a_resume_the_metrics_hold_each_measurement_once(
    broken: Path, whole: Path, cache: Path, tiny_spec: Build
) -> None:
    shutil.rmtree(broken / "checkpoints" / "checkpoint-6")
    resume(broken, cache, tiny_spec())
    columns = ["step", "split", "name"]
    assert not read_run(broken).metrics.duplicated(columns).any()
    assert sorted(read_run(broken).metrics[columns].values.tolist()) == sorted(
        read_run(whole).metrics[columns].values.tolist()
    )


def test_what_a_kill_left_half_written_is_cleared_away(
    broken: Path, whole: Path, cache: Path, tiny_spec: Build
) -> None:
    shutil.rmtree(broken / "checkpoints" / "checkpoint-6")
    for name in (".staging/checkpoint-6", ".staging/checkpoint-5"):
        (broken / "checkpoints" / name).mkdir(parents=True)
        (broken / "checkpoints" / name / "pytorch_model.bin").write_text("torn")
    (broken / ".model.tmp").mkdir()
    (broken / ".model.tmp" / "model.safetensors").write_text("torn")
    (broken / ".run.json.99.tmp").write_text("torn")
    resume(broken, cache, tiny_spec())
    assert same_result(broken, whole)
    assert not [path for path in broken.rglob("*") if path.is_file() and path.read_bytes() == b"torn"]
    assert not list(broken.rglob(".staging")) + list(broken.glob(".*.tmp"))


def test_a_run_without_any_sound_checkpoint_begins_again(
    broken: Path, whole: Path, cache: Path, tiny_spec: Build
) -> None:
    for step in (4, 6):
        harm(broken / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt", "cut")
    resume(broken, cache, tiny_spec())
    assert same_result(broken, whole)
    assert read_run(broken).facts["resumed"] == 0
    set_aside = sorted(path.name for path in (broken / "checkpoints" / "damaged").iterdir())
    assert set_aside == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.slow
def test_a_study_resumes_too(broken: Path, whole: Path, cache: Path, tiny: list[str], tmp_path: Path) -> None:
    from normfree.training.study import run_study

    harm(broken / "checkpoints" / "checkpoint-6" / "model.safetensors", "flip")
    harm(broken / "run.json", "cut")
    study = {"preset": "cpu-quick", "groups": [{"variants": ["sm-r"]}]}
    (tmp_path / "single.yaml").write_text(json.dumps(study))
    overrides = [word for word in tiny if not word.startswith("preset=")]
    places = [f"runs_dir={broken.parents[1]}", f"cache_dir={cache}", "study=single"]
    run_study(str(tmp_path / "single.yaml"), [*overrides, *places])
    assert read_run(broken).status == "finished"
    assert same_result(broken, whole)


def test_another_text_is_never_trained_on_in_silence(
    broken: Path, cache: Path, tiny_spec: Build, tmp_path: Path
) -> None:
    spec = tiny_spec()
    text = Path(spec.data.paths[0]).parent
    changed = tmp_path / "text"
    shutil.copytree(text, changed)
    there = changed / "0.py"
    there.write_text(there.read_text().replace("self", "this"))
    shutil.move(text, tmp_path / "kept")
    try:
        shutil.copytree(changed, text)
        with pytest.raises(ValueError, match=r"trained on a corpus with fingerprint.*tag="):
            resume(broken, cache, spec)
    finally:
        shutil.rmtree(text)
        shutil.move(tmp_path / "kept", text)


def test_other_surroundings_are_warned_of(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = whole / "checkpoints" / "checkpoint-6"
    names = ("corpus", "threads", "instruction_set", "bf16_units", "torch")
    then = {name: read_manifest(checkpoint)[name] for name in names}
    with caplog.at_level(logging.WARNING, "normfree"):
        compare_surroundings(checkpoint, then)
        assert not caplog.text
        compare_surroundings(checkpoint, {**then, "threads": 2})
    assert "numbers may differ: threads was 1 and is 2" in caplog.text


def test_a_run_goes_on_in_smaller_passes_and_under_changed_code_with_a_warning(
    broken: Path,
    whole: Path,
    cache: Path,
    tiny_spec: Build,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("normfree.training.environment.model_code", lambda: "another")
    spec = tiny_spec("train.micro_batch_sequences=2", "train.gradient_checkpointing=true", "train.evaluate_every=1")
    resume(broken, cache, spec)
    resumed, uninterrupted = read_run(broken), read_run(whole)
    assert resumed.perplexity == pytest.approx(uninterrupted.perplexity, rel=1e-5)
    losses = [[loss for _, loss in run.series("train", "loss")] for run in (resumed, uninterrupted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "micro_batch_sequences was 8 and is 2, gradient_checkpointing was False and is True" in caplog.text
    assert "and is another" in caplog.text


def test_a_checkpoint_needs_no_trust(whole: Path) -> None:
    """Every torch file loads with weights_only=True, and Trainer's pickle of its arguments is not kept."""
    checkpoint = whole / "checkpoints" / "checkpoint-6"
    for name in ("optimizer.pt", "scheduler.pt"):
        assert isinstance(torch.load(checkpoint / name, weights_only=True), dict)
    from transformers.trainer_pt_utils import safe_globals

    with safe_globals():  # numpy's random state; what Trainer itself allows
        assert torch.load(checkpoint / "rng_state.pth", weights_only=True)["cpu"].numel() > 0
    assert not list(whole.rglob("training_args.bin"))
