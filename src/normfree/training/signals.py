"""Signals that stop training cleanly: at the next step, with a checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normfree.training.processes import highest_of_all_processes

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a cluster sends shortly before a job's time limit."""
TOGETHER_SECONDS = 3.0
"""Signals this close are one request that came twice: to the process, and passed on by its parent."""


def stopping_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM, SIGHUP unless nohup ignores it, and in a SLURM job the `WARNINGS` without a handler."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    unhandled = [number for number in WARNINGS if signal.getsignal(number) is signal.SIG_DFL]
    return [signal.SIGINT, signal.SIGTERM, *hangup, *(unhandled if "SLURM_JOB_ID" in os.environ else [])]


def warning_signals() -> list[signal.Signals]:
    """The `WARNINGS` with a Python handler installed, e.g. by submitit."""
    return [number for number in WARNINGS if callable(signal.getsignal(number))]


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], Any], numbers: Iterable[int]) -> Iterator[None]:
    """Call `handler` on these signals. Outside the main thread, where Python delivers none, it does nothing."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in numbers} if in_main_thread else {}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)  # None: installed outside Python


class InterruptedRunError(Exception):
    """A signal ended a run: after a checkpoint, at once on a second signal, or in the step in which it diverged."""

    def __init__(self, folder: os.PathLike[str], signal_number: int, outcome: str) -> None:
        super().__init__(folder, signal_number, outcome)  # all arguments, so that it can be pickled
        self.folder, self.signal_number, self.outcome = folder, signal_number, outcome

    def __str__(self) -> str:
        return f"{self.folder} {self.outcome}"


class StopOnSignal(TrainerCallback):
    """Stops training at the next step boundary, with a checkpoint, when `receive` got a signal.

    `receive` raises KeyboardInterrupt at once on a second SIGINT, on a second signal after `TOGETHER_SECONDS`, or when
    no step will follow (`at_once`). SIGUSR1 and SIGUSR2 never count as a second signal: SLURM preempts with SIGTERM and
    then sends the warning.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that this or another process of the run received."""
        self.at_once = False
        self._first_seconds: float | None = None

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        now = time.monotonic()
        first, self._first_seconds = self._first_seconds, self._first_seconds or now
        self.received = number
        late = first is not None and now - first > TOGETHER_SECONDS and number not in WARNINGS
        if self.at_once or late or (first is not None and number == signal.SIGINT):
            raise KeyboardInterrupt

    def agree(self, device: torch.device) -> int | None:
        """Return the signal that any process received, the same in all. One that arrives meanwhile counts next time."""
        if agreed := highest_of_all_processes(self.received or 0, device):
            self.received = agreed
        return agreed or None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agree(args.device) is not None and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
