"""What needs processes of its own: two ranks on the CPU, and trackers."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.spec.compose import compose_run, members
from normfree.store.runs import Run, RunWriter, read_run
from normfree.training.ranks import state_of_processes


@contextmanager
def started(words: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command, which ends here with all that it started: torchrun gives each rank a session of its own."""
    with (folder / "told").open("w") as told:
        process = subprocess.Popen([sys.executable, *words], cwd=folder, stdout=told, stderr=told, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
            process.wait(timeout=60)


def run_command(words: list[str], folder: Path) -> str:
    """What the command said."""
    with started(words, folder) as process:
        status = process.wait(timeout=150)
    told = (folder / "told").read_text()
    assert status == 0, told[-3000:]
    return told


def entropies(run: Run) -> list[list[float]]:
    return run.last("final", "entropy_nats") or []


@pytest.mark.parametrize("preset", ["cpu", "cpu-pythia"])
@pytest.mark.parametrize("variant", [name for name in members("variant") if name != "custom"])
def test_every_parameter_has_a_gradient_for_processes_to_average(preset: str, variant: str) -> None:
    """DistributedDataParallel is told to expect all of them."""
    spec = compose_run([f"preset={preset}", f"variant={variant}"]).spec
    config = NormFreeConfig(**spec.model | {"hidden_size": 32, "vocab_size": 50, "max_position_embeddings": 8})
    model = NormFreeForCausalLM(config)
    ids_BT = torch.arange(16).view(2, 8)
    model(input_ids=ids_BT, labels=ids_BT, return_logits=False).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "left_over", [{"WORLD_SIZE": "4", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "1"}, {"PMI_SIZE": "2"}]
)
def test_who_waits_for_others_says_so_after_ten_seconds(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_over: dict[str, str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {**left_over, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    name, value = next(iter(left_over.items()))
    with started(["-m", "normfree", "train", *tiny, "variant=sm-r"], tmp_path) as process:
        while "waiting" not in (told := (tmp_path / "told").read_text()) and process.poll() is None:
            time.sleep(0.2)
    assert f"waiting at 127.0.0.1:{port} for the other processes; the environment has {name}={value}" in told
    assert f"unset {' '.join(left_over)}" in told


def test_a_number_of_processes_without_a_meeting_point_is_refused_with_what_to_unset(monkeypatch) -> None:
    monkeypatch.setattr(PartialState, "_shared_state", {})
    environment = mock.patch.dict(os.environ, {"WORLD_SIZE": "4"})  # Accelerate sets RANK and others there
    message = r"MASTER_ADDR.* the environment has WORLD_SIZE=4: .* unset WORLD_SIZE"
    with environment, pytest.raises(ValueError, match=message):
        state_of_processes(cpu=True, timeout=timedelta(seconds=60))


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one_and_only_the_first_writes(
    tiny: list[str], cache: Path, tmp_path: Path
) -> None:
    words = ["train", *tiny, "variant=sm-r", "train.micro_batch_sequences=4", f"cache_dir={cache}"]
    run_command(["-m", "normfree", *words, "runs_dir=one"], tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "normfree"]
    told = run_command([*torchrun, *words, "runs_dir=two"], tmp_path)
    assert told.count("sm-r-seed0: training on cpu, 2 processes, 1 thread each, precision fp32") == 1
    assert "find_unused_parameters" not in told  # which each step would pay for
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
    (two.folder / "run.json").unlink()
    shutil.rmtree(two.folder / "checkpoints" / "checkpoint-6")
    run_command([*torchrun, *words, "runs_dir=two"], tmp_path)
    again = read_run(two.folder)
    assert again.facts["command"].startswith("torchrun --nproc_per_node 2 -m normfree.cli.main train ")
    assert (one.facts["environment"]["processes"], again.facts["environment"]["processes"]) == (1, 2)
    assert (again.status, again.facts["sessions"][0]["from_step"], again.perplexity) == ("finished", 4, two.perplexity)


NOTES_ITS_FIRST_MASK = """
import os, sys, torch
from normfree.spec.compose import compose_run
from normfree.training import train

kept, forward = [], torch.nn.Dropout.forward

def noting(self, values):
    dropped = forward(self, values)
    if self.training and self.p:
        kept.append(dropped != 0)
    return dropped

torch.nn.Dropout.forward = noting
run = compose_run(sys.argv[1:])
train(run.spec, runs_dir=run.runs_dir, cache=run.cache_dir)
torch.save(kept[0], f"mask{os.environ['RANK']}.pt")
"""


@pytest.mark.slow
def test_two_processes_drop_different_features(tiny: list[str], cache: Path, tmp_path: Path) -> None:
    (tmp_path / "noting.py").write_text(NOTES_ITS_FIRST_MASK)
    words = [*tiny, "variant=sm-r", "train.micro_batch_sequences=4", "model.embedding_dropout=0.5", "train.steps=1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run_command([*torchrun, "noting.py", *words, f"cache_dir={cache}"], tmp_path)
    first, second = (torch.load(tmp_path / f"mask{rank}.pt") for rank in (0, 1))
    assert first.shape == second.shape
    assert (first == second).float().mean().item() == pytest.approx(0.5, abs=0.1)  # as two masks that know no other


@pytest.mark.slow
def test_a_signal_that_one_of_two_processes_gets_stops_both_after_the_same_step(
    tiny: list[str], cache: Path, tmp_path: Path
) -> None:
    """The second process alone is told; the first, which keeps the records, saves and says that it was interrupted."""
    words = ["train", *tiny, "variant=sm-r", "train.micro_batch_sequences=4", "train.steps=null", "train.epochs=100"]
    words += ["train.checkpoint_every=100000", "train.evaluate_every=100000", "probe.every_steps=100000"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "normfree"]
    folder = tmp_path / "runs" / "single" / "sm-r-seed0"
    metrics = folder / "metrics.jsonl"
    with started([*torchrun, *words, f"cache_dir={cache}"], tmp_path) as launcher:
        deadline = time.monotonic() + 200
        while not (metrics.exists() and '"step": 3, "split": "train"' in metrics.read_text()):
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (second,) = (child for child in psutil.Process(launcher.pid).children() if child.environ().get("RANK") == "1")
        second.terminate()
        launcher.wait(timeout=120)
    run = read_run(folder)
    assert run.status == "interrupted"
    assert (folder / "checkpoints" / f"checkpoint-{run.facts['steps_done']}" / "manifest.json").exists()


@pytest.mark.slow
def test_each_run_of_a_sweep_is_one_of_wandb_and_a_resume_goes_on_with_it(
    tiny: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["-m", "normfree", "train", *tiny, "variant=sm-r", "train.trackers=[wandb]", f"cache_dir={cache}"]
    assert "wandb is offline" not in run_command([*words, "-m", "seed=0,1"], tmp_path)

    def ids() -> list[str]:
        return [path.name.rpartition("-")[2] for path in sorted((tmp_path / "wandb").glob("offline-run-*"))]

    first, second = ids()
    assert first != second
    run = read_run(tmp_path / "runs" / "single" / "sm-r-seed0")
    RunWriter(run.folder, run.facts).update(status="interrupted")  # as a signal in its last evaluation leaves it
    assert "syncing one may replace the other" in run_command(words, tmp_path)
    assert ids() == [first, second, first]


@pytest.mark.slow
def test_trackers_get_losses_and_perplexity_offline(
    tiny: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["train", *tiny, "variant=sm-r", "train.trackers=[tensorboard,wandb,trackio]", f"cache_dir={cache}"]
    run_command(["-m", "normfree", *words], tmp_path)
    run = read_run(tmp_path / "runs" / "single" / "sm-r-seed0")
    assert run.status == "finished"
    assert list(tmp_path.rglob("*.wandb"))
    assert list((tmp_path / "trackio").rglob("*.db"))
    told = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [event.value for event in told.Scalars("eval/final_perplexity")] == pytest.approx([run.perplexity])
    for name, recorded in (("eval/perplexity", ("validation", "perplexity")), ("train/loss", ("train", "loss"))):
        events = [(event.step, event.value) for event in told.Scalars(name)]
        assert [step for step, _ in events] == [step for step, _ in run.series(*recorded)]
        assert [value for _, value in events] == pytest.approx([value for _, value in run.series(*recorded)])
