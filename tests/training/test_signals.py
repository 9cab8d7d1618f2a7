"""Signals at the worst moments: a second Ctrl-C, one in the middle of a save, one in the final evaluation."""

from __future__ import annotations

import math
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from normfree.training.sweep import sweep
from safetensors.torch import load_file

from normfree.files import damages
from normfree.spec.compose import compose_run
from normfree.spec.run import RunSpec
from normfree.store.checkpoints import CheckpointError, checkpoints_in
from normfree.store.runs import read_run
from normfree.training import InterruptedRunError, train
from normfree.training.callbacks import StopOnSignal
from normfree.training.trainer import NormFreeTrainer
from tests.training.signals import terminate_in_step

Build = Callable[..., RunSpec]


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, cache: Path, tiny: list[str]) -> dict[str, torch.Tensor]:
    spec = compose_run([*tiny, "variant=sm-r"]).spec
    folder = train(spec, runs_dir=tmp_path_factory.mktemp("whole"), cache=cache, progress=False)
    return load_file(folder / "model" / "model.safetensors")


def check_resume(folder: Path, cache: Path, spec: RunSpec, expected: dict[str, torch.Tensor]) -> None:
    assert not any(damages(checkpoint) for checkpoint in checkpoints_in(folder / "checkpoints"))
    assert not (folder / "checkpoints" / ".staging").exists()
    train(spec, runs_dir=folder.parents[1], cache=cache, progress=False)
    found = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not read_run(folder).metrics.duplicated(["step", "split", "name"]).any()


@pytest.mark.parametrize(
    ("place", "second"),
    [
        ("training_step", signal.SIGINT),
        ("_save_optimizer_and_scheduler", signal.SIGINT),
        ("_save_optimizer_and_scheduler", signal.SIGTERM),
    ],
)
def test_a_second_signal_leaves_at_once_and_nothing_older_is_lost(
    tmp_path: Path,
    cache: Path,
    tiny_spec: Build,
    expected: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    second: signal.Signals,
) -> None:
    original = getattr(NormFreeTrainer, place)

    def interrupted(trainer: NormFreeTrainer, *rest: Any, **named: Any) -> Any:
        if trainer.state.global_step == 4:
            send(signal.SIGINT, second)
        return original(trainer, *rest, **named)

    monkeypatch.setattr(NormFreeTrainer, place, interrupted)
    monkeypatch.setattr("normfree.training.callbacks.TOGETHER_SECONDS", 0.0)  # so the second was meant as one
    with pytest.raises(InterruptedRunError, match=r"left at once on signal .*the same command goes on") as stopped:
        train(tiny_spec(), runs_dir=tmp_path / "broken", cache=cache, progress=False)
    monkeypatch.undo()
    folder = stopped.value.folder
    done = 4 if place == "training_step" else 2  # the save of step 4 was not finished
    assert stopped.value.signal_number == second
    assert (read_run(folder).status, read_run(folder).facts["steps_done"]) == ("interrupted", done)
    assert checkpoints_in(folder / "checkpoints")[0].name == f"checkpoint-{done}"
    check_resume(folder, cache, tiny_spec(), expected)


@pytest.mark.parametrize("place", ["evaluate_blocks", "_save_model"])
def test_a_signal_after_the_last_step_leaves_at_once_and_only_the_end_is_repeated(
    tmp_path: Path,
    cache: Path,
    tiny_spec: Build,
    expected: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    module: Any = sys.modules["normfree.training.train"]
    original = getattr(module, place)

    def interrupted(*rest: Any, **named: Any) -> Any:
        send(signal.SIGTERM)
        return original(*rest, **named)

    monkeypatch.setattr(module, place, interrupted)
    with pytest.raises(InterruptedRunError, match="left at once") as stopped:
        train(tiny_spec(), runs_dir=tmp_path / "broken", cache=cache, progress=False)
    monkeypatch.undo()
    folder = stopped.value.folder
    assert (read_run(folder).status, read_run(folder).facts["steps_done"]) == ("interrupted", 6)
    assert not (folder / "model").exists()
    check_resume(folder, cache, tiny_spec(), expected)
    assert read_run(folder).facts["resumed"] == 1


def test_a_request_that_arrives_twice_is_one_request(
    tmp_path: Path, cache: Path, tiny_spec: Build, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun and `study workers=N` hand a SIGTERM on to processes that whoever sent it may have told too."""
    original = NormFreeTrainer._save_optimizer_and_scheduler

    def interrupted(trainer: NormFreeTrainer, *rest: Any, **named: Any) -> Any:
        send(signal.SIGTERM, signal.SIGTERM)
        return original(trainer, *rest, **named)

    monkeypatch.setattr(NormFreeTrainer, "_save_optimizer_and_scheduler", interrupted)
    with pytest.raises(InterruptedRunError, match="and saved") as stopped:
        train(tiny_spec(), runs_dir=tmp_path / "broken", cache=cache, progress=False)
    monkeypatch.undo()
    check_resume(stopped.value.folder, cache, tiny_spec(), expected)


def test_the_own_signal_after_another_process_s_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfree.training.callbacks._highest_of_all_processes", lambda *_: signal.SIGTERM)
    monkeypatch.setattr("normfree.training.callbacks.TOGETHER_SECONDS", 0.0)
    with StopOnSignal() as stop:
        assert stop.agree(torch.device("cpu")) == signal.SIGTERM
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)


def test_a_launcher_s_warning_saves_and_the_launcher_hears_of_it_after_that(
    tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit listens to SIGUSR2 before a time limit, and ends the job or queues it again."""
    terminate_in_step(3, monkeypatch, with_signal=signal.SIGUSR2)
    folder = tmp_path / "single" / "sm-r-seed0"
    heard: list[str] = []

    def listener(*_: object) -> None:
        heard.extend(path.name for path in checkpoints_in(folder / "checkpoints"))

    before = signal.signal(signal.SIGUSR2, listener)
    try:
        with pytest.raises(InterruptedRunError, match="stopped by signal 12 and saved"):
            train(tiny_spec(), runs_dir=tmp_path, cache=cache, progress=False)
        assert signal.getsignal(signal.SIGUSR2) is listener
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard[0] == "checkpoint-4"
    assert read_run(folder).status == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_of_slurm_to_which_nobody_listens_saves_instead_of_killing(
    number: signal.Signals, tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`#SBATCH --signal=USR1@300` before a command of ours."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    terminate_in_step(3, monkeypatch, with_signal=number)
    with pytest.raises(InterruptedRunError, match=f"stopped by signal {number} and saved"):
        train(tiny_spec(), runs_dir=tmp_path, cache=cache, progress=False)
    assert signal.getsignal(number) is signal.SIG_DFL
    assert read_run(tmp_path / "single" / "sm-r-seed0").facts["steps_done"] == 4


def test_outside_slurm_a_signal_to_which_nobody_listens_keeps_its_action(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with StopOnSignal():
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_warning_after_the_sigterm_of_a_preemption_does_not_cost_the_checkpoint(
    tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM sends SIGTERM when it preempts a job, and submitit waits for the SIGUSR2 that follows."""
    monkeypatch.setattr("normfree.training.callbacks.TOGETHER_SECONDS", 0.0)
    original = NormFreeTrainer.training_step

    def preempted(trainer: NormFreeTrainer, *rest: Any, **named: Any) -> Any:
        if trainer.state.global_step == 3:
            send(signal.SIGTERM, signal.SIGUSR2)
        return original(trainer, *rest, **named)

    monkeypatch.setattr(NormFreeTrainer, "training_step", preempted)
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    try:
        with pytest.raises(InterruptedRunError, match="stopped by signal 12 and saved"):
            train(tiny_spec(), runs_dir=tmp_path, cache=cache, progress=False)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]
    assert read_run(tmp_path / "single" / "sm-r-seed0").facts["steps_done"] == 4


def test_a_signal_in_the_last_step_is_heard(
    tmp_path: Path, cache: Path, tiny_spec: Build, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminate_in_step(5, monkeypatch)
    with pytest.raises(InterruptedRunError, match="and saved") as stopped:
        train(tiny_spec(), runs_dir=tmp_path / "broken", cache=cache, progress=False)
    monkeypatch.undo()
    check_resume(stopped.value.folder, cache, tiny_spec(), expected)


def test_a_signal_while_processes_ask_each_other_is_heard_after_the_next_step(
    tmp_path: Path, cache: Path, tiny_spec: Build, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes wait for the slowest of them there, step by step."""
    steps: list[int | None] = []

    def ask(received: int | None, _device: torch.device) -> int | None:
        steps.append(received)
        if len(steps) == 3:
            send(signal.SIGTERM)
        return received

    monkeypatch.setattr("normfree.training.callbacks._highest_of_all_processes", ask)
    with pytest.raises(InterruptedRunError, match="and saved") as stopped:
        train(tiny_spec(), runs_dir=tmp_path / "broken", cache=cache, progress=False)
    monkeypatch.undo()
    assert read_run(stopped.value.folder).facts["steps_done"] == 4
    check_resume(stopped.value.folder, cache, tiny_spec(), expected)


def test_a_run_that_diverges_in_the_step_of_a_signal_is_not_said_to_go_on(
    tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = NormFreeTrainer.training_step

    def broken(trainer: NormFreeTrainer, *rest: Any, **named: Any) -> Any:
        if trainer.state.global_step == 3:
            send(signal.SIGTERM)
            next(trainer.network.parameters()).data.fill_(math.nan)
        return original(trainer, *rest, **named)

    monkeypatch.setattr(NormFreeTrainer, "training_step", broken)
    with pytest.raises(
        InterruptedRunError, match=r"diverged in the step in which signal 15 came: it is over"
    ) as stopped:
        train(tiny_spec(), runs_dir=tmp_path, cache=cache, progress=False)
    assert read_run(stopped.value.folder).facts["divergence"]["step"] == 4


def test_a_resumed_run_logs_and_saves_at_the_intervals_of_its_new_start(
    tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminate_in_step(1, monkeypatch)
    seldom = tiny_spec("train.checkpoint_every=100", "train.log_every=100")
    with pytest.raises(InterruptedRunError):
        train(seldom, runs_dir=tmp_path, cache=cache, progress=False)
    monkeypatch.undo()
    often = tiny_spec("train.checkpoint_every=1", "train.log_every=1", "train.checkpoints_kept=10")
    folder = train(often, runs_dir=tmp_path, cache=cache, progress=False)
    assert [path.name[11:] for path in checkpoints_in(folder / "checkpoints")] == ["6", "5", "4", "3", "2"]
    assert [step for step, _ in read_run(folder).series("train", "loss")][-4:] == [3, 4, 5, 6]


def test_a_signal_ends_a_sweep_and_starts_no_other_job(
    tmp_path: Path, cache: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    terminate_in_step(3, monkeypatch)
    with pytest.raises(InterruptedRunError, match="and saved"):
        sweep([*tiny, "variant=sm-r", "seed=0,1,2", f"cache_dir={cache}"])
    assert [path.parent.name for path in tmp_path.glob("runs/single/*/run.json")] == ["sm-r-seed0"]


@pytest.mark.parametrize(
    "error", [InterruptedRunError(Path("run"), 15, saved=True), CheckpointError(3, OSError("full"))]
)
def test_what_ends_a_job_can_travel_to_another_process(error: Exception) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert (type(there), str(there)) == (type(error), str(error))
    assert getattr(there, "signal_number", None) == getattr(error, "signal_number", None)


def test_a_closed_terminal_does_not_end_a_run_under_nohup(
    tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = NormFreeTrainer.training_step

    def hung_up(trainer: NormFreeTrainer, *rest: Any, **named: Any) -> Any:
        send(signal.SIGHUP)
        return original(trainer, *rest, **named)

    monkeypatch.setattr(NormFreeTrainer, "training_step", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        folder = train(tiny_spec("train.steps=2"), runs_dir=tmp_path, cache=cache, progress=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_run(folder).status == "finished"


def test_handlers_are_given_back(
    tmp_path: Path, cache: Path, tiny_spec: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    before = handlers()
    train(tiny_spec("train.steps=1"), runs_dir=tmp_path, cache=cache, progress=False)
    assert handlers() == before
    terminate_in_step(1, monkeypatch)
    with pytest.raises(InterruptedRunError):
        train(tiny_spec("tag=stopped"), runs_dir=tmp_path, cache=cache, progress=False)
    assert handlers() == before


def test_other_threads_can_train(tmp_path: Path, cache: Path, tiny_spec: Build) -> None:
    ended: list[Path] = []
    spec = tiny_spec("train.steps=1")
    thread = threading.Thread(target=lambda: ended.append(train(spec, runs_dir=tmp_path, cache=cache, progress=False)))
    thread.start()
    thread.join()
    assert read_run(ended[0]).status == "finished"
