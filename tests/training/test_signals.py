"""Signals at the worst moments: a second Ctrl-C, one in the middle of a save, one in the final evaluation."""

import math
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from normfree.store.checkpoints import CheckpointError, checkpoints_in
from normfree.store.runs import Run, read_run
from normfree.training import InterruptedRunError
from normfree.training.signals import StopOnSignal, stopping_signals
from tests.training.runs import act_in, check_equal_runs, send_in_step

CPU = torch.device("cpu")


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@contextmanager
def handler(number: signal.Signals, action: Any) -> Iterator[None]:
    before = signal.signal(number, action)
    try:
        yield
        assert signal.getsignal(number) is action, "training gives handlers back"
    finally:
        signal.signal(number, before)


@pytest.fixture
def interrupt(train_tiny, tiny_folder: Path) -> Callable[..., Run]:
    """`interrupt(message, *overrides)`: train until a signal ends the run with that message, and read the folder."""

    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def run(message: str, *overrides: str) -> Run:
        before = handlers()
        with pytest.raises(InterruptedRunError, match=message) as stopped:
            train_tiny(*overrides)
        assert stopped.value.folder == tiny_folder
        assert handlers() == before, "training gives handlers back"
        return read_run(tiny_folder)

    return run


@pytest.mark.parametrize(
    ("method", "second"),
    [
        ("training_step", signal.SIGINT),
        ("_save_optimizer_and_scheduler", signal.SIGINT),
        ("_save_optimizer_and_scheduler", signal.SIGTERM),
    ],
)
def test_a_second_signal_stops_at_once(interrupt, train_tiny, trained, monkeypatch, method, second) -> None:
    """And nothing older is lost."""
    with monkeypatch.context() as patch:
        patch.setattr("normfree.training.signals.TOGETHER_SECONDS", 0.0)
        act_in(method, lambda trainer: send(signal.SIGINT, second) if trainer.state.global_step == 4 else None, patch)
        run = interrupt(rf"stopped at once by signal {int(second)}; the same command resumes")
    done = 4 if method == "training_step" else 2  # the save of step 4 was not finished
    assert (run.status, run.facts["steps_done"]) == ("interrupted", done)
    assert checkpoints_in(run.folder / "checkpoints")[0].name == f"checkpoint-{done}"
    train_tiny()
    check_equal_runs(run.folder, trained)


@pytest.mark.parametrize("name", ["evaluate_blocks", "_save_model"])
def test_a_signal_after_the_last_step_repeats_only_the_end(interrupt, train_tiny, trained, monkeypatch, name) -> None:
    module: Any = sys.modules["normfree.training.train"]
    original = getattr(module, name)

    def interrupted(*rest: Any, **named: Any) -> Any:
        send(signal.SIGTERM)
        return original(*rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        run = interrupt("stopped at once")
    assert (run.status, run.facts["steps_done"]) == ("interrupted", 6)
    assert not (run.folder / "model").exists()
    assert train_tiny().facts["resumed"] == 1
    check_equal_runs(run.folder, trained)


@pytest.mark.parametrize(
    ("method", "after", "numbers"),
    [("training_step", 5, [signal.SIGTERM]), ("_save_optimizer_and_scheduler", 2, [signal.SIGTERM, signal.SIGTERM])],
    ids=["last step", "twice"],  # a parent may pass on a SIGTERM that the process received already
)
def test_a_signal_is_one_request_to_stop(method, after, numbers, interrupt, train_tiny, trained, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        act_in(method, lambda trainer: send(*numbers) if trainer.state.global_step == after else None, patch)
        run = interrupt("and saved")
    train_tiny()
    check_equal_runs(run.folder, trained)


def test_an_own_signal_after_another_process_is_the_first(monkeypatch) -> None:
    monkeypatch.setattr("normfree.training.signals.highest_of_all_processes", lambda *_: signal.SIGTERM)
    monkeypatch.setattr("normfree.training.signals.TOGETHER_SECONDS", 0.0)
    stop = StopOnSignal()
    assert stop.agree(CPU) == signal.SIGTERM
    stop.receive(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGTERM)


@pytest.mark.parametrize("first", [(), (signal.SIGTERM,)], ids=["alone", "after SIGTERM"])
def test_a_warning_saves_before_its_handler_acts(interrupt, tiny_folder, monkeypatch, first) -> None:
    """submitit handles SIGUSR2 before a time limit; SLURM preempts with SIGTERM and then sends it."""
    monkeypatch.setattr("normfree.training.signals.TOGETHER_SECONDS", 0.0)
    send_in_step(3, monkeypatch, *first, signal.SIGUSR2)
    saved: list[str] = []

    def act(*_: object) -> None:
        saved.extend(path.name for path in checkpoints_in(tiny_folder / "checkpoints"))

    with handler(signal.SIGUSR2, act):
        run = interrupt("stopped by signal 12 and saved")
    assert saved[0] == "checkpoint-4"
    assert (run.status, run.facts["steps_done"]) == ("interrupted", 4)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_of_slurm_without_handler_saves(number, interrupt, monkeypatch) -> None:
    """`#SBATCH --signal=USR1@300`; outside SLURM the signal keeps its action."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert number not in stopping_signals()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    send_in_step(3, monkeypatch, number)
    run = interrupt(f"stopped by signal {int(number)} and saved")
    assert signal.getsignal(number) is signal.SIG_DFL
    assert run.facts["steps_done"] == 4


def test_a_run_that_diverges_on_a_signal_is_over(interrupt, monkeypatch) -> None:
    def diverge(trainer: Any) -> None:
        if trainer.state.global_step == 3:
            send(signal.SIGTERM)
            next(trainer.network.parameters()).data.fill_(math.nan)

    act_in("training_step", diverge, monkeypatch)
    run = interrupt(r"diverged in the step of signal 15: the run is over")
    assert run.facts["divergence"]["step"] == 4


def test_a_resume_logs_and_saves_at_its_new_intervals(interrupt, train_tiny, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        send_in_step(1, patch)
        interrupt("and saved", "train.checkpoint_every=100", "train.log_every=100")
    run = train_tiny("train.checkpoint_every=1", "train.log_every=1", "train.checkpoints_kept=10")
    assert [path.name[11:] for path in checkpoints_in(run.folder / "checkpoints")] == ["6", "5", "4", "3", "2"]
    assert [step for step, _ in run.series("train", "loss")][-4:] == [3, 4, 5, 6]


@pytest.mark.parametrize("error", [InterruptedRunError(Path("run"), 15, "was stopped"), CheckpointError("full")])
def test_errors_of_a_job_can_be_pickled(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))
    assert getattr(copy, "signal_number", None) == getattr(error, "signal_number", None)


def test_a_closed_terminal_does_not_stop_nohup(train_tiny, monkeypatch) -> None:
    send_in_step(1, monkeypatch, signal.SIGHUP)
    with handler(signal.SIGHUP, signal.SIG_IGN):
        assert train_tiny("train.steps=2").status == "finished"


def test_other_threads_can_train(train_tiny) -> None:
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(train_tiny("train.steps=1")))
    thread.start()
    thread.join()
    assert runs[0].status == "finished"
