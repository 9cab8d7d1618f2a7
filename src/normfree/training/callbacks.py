"""Trainer callbacks: log lines, measurements, signals and the progress bar.

Every process computes the values and reduces them; only rank 0 writes.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normfree.measures import open_measures, periods_of
from normfree.measures.held_out import blocks_of, measure_batches
from normfree.measures.measure import values_of
from normfree.measures.text_perplexity import spread
from normfree.model.modeling import NormFreePreTrainedModel
from normfree.spec.run import RunSpec
from normfree.store.progress import duration
from normfree.training.distributed import highest_of_all_processes
from normfree.training.objectives import Objective
from normfree.training.signals import WARNINGS, stopping_signals, warning_signals

logger = logging.getLogger("normfree")

LINE_SECONDS = 60.0
"""Time between two lines of progress where standard error is no terminal."""
TOGETHER_SECONDS = 3.0
"""Signals this close are one request that came twice: to the process, and passed on by its parent."""

Log = Callable[[int, str, Iterable[tuple[str, Any]]], None]
"""Writes (name, value) pairs of a step and split."""


@dataclass(frozen=True)
class Schedule:
    """Measures to run before the first step, every `every` steps and after the last step."""

    split: str
    every: int
    measures: list[str]
    blocks_NT: Tensor


class Recorder(TrainerCallback):
    """Writes Trainer's log lines and measures held-out blocks on schedule; scalars also go to `log_to_trackers`."""

    def __init__(
        self,
        spec: RunSpec,
        held_out_NT: Tensor,
        log: Log,
        *,
        log_to_trackers: Callable[[dict[str, float]], None],
        objective: Objective,
    ) -> None:
        self.objective = objective
        self.log, self.log_to_trackers = log, log_to_trackers
        self.tokens_per_step = spec.train.batch_sequences * spec.data.context
        self.batch_sequences = spec.train.micro_batch_sequences
        self._steps, self._seconds, self._began = 0, 0.0, 0.0
        names_by_period: dict[int, list[str]] = {}
        for name, every in periods_of(spec.probe.measures, spec.probe.every_steps).items():
            names_by_period.setdefault(every, []).append(name)
        probe_NT = spread(held_out_NT, spec.probe.sequences)
        self.schedules = [Schedule("probe", every, names, probe_NT) for every, names in names_by_period.items()]
        validation_NT = spread(held_out_NT, spec.train.evaluation_sequences or len(held_out_NT))
        self.schedules.append(Schedule("validation", spec.train.evaluate_every, ["perplexity"], validation_NT))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)  # Trainer would log and save at the intervals of the checkpoint
        if state.global_step == 0:
            self._measure(state, control, self.schedules, rest["model"])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._seconds += time.perf_counter() - self._began
        self._steps += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        last = state.global_step == state.max_steps
        due = [schedule for schedule in self.schedules if last or state.global_step % schedule.every == 0]
        self._measure(state, control, due, rest["model"])
        if any(schedule.split == "probe" for schedule in due):
            self.log(state.global_step, "probe", self.objective.values().items())

    def _measure(
        self, state: TrainerState, control: TrainerControl, due: list[Schedule], model: NormFreePreTrainedModel
    ) -> None:
        for schedule in due:
            values = measurements(model, schedule.blocks_NT, schedule.measures, batch_sequences=self.batch_sequences)
            self.log(state.global_step, schedule.split, values)
            if scalars := {f"eval_{name}": value for name, value in values if isinstance(value, float)}:
                training_loss_due = control.should_log
                self.log_to_trackers(scalars)
                control.should_log = training_loss_due  # Trainer takes any log call for the one that was due

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        logs: dict[str, float] = rest["logs"]
        if "loss" not in logs:
            return
        values = {"loss": logs["loss"], "learning_rate": logs["learning_rate"]}
        if "grad_norm" in logs:
            values["gradient_norm"] = logs["grad_norm"]
        values["tokens_seen"] = state.global_step * self.tokens_per_step
        if self._seconds:  # of the steps alone, without loading, measuring and saving
            values["tokens_per_second"] = self._steps * self.tokens_per_step / self._seconds
        self._steps, self._seconds = 0, 0.0
        self.log(state.global_step, "train", values.items())


class StopOnSignal(TrainerCallback):
    """Stops training at the next step boundary, with a checkpoint, when a signal arrives inside `with`.

    The signals are those of `stopping_signals` and `warning_signals`. It raises KeyboardInterrupt at once on a second
    SIGINT, on a second signal after `TOGETHER_SECONDS`, or when no step will follow (`at_once`). SIGUSR1 and SIGUSR2
    never count as a second signal: SLURM preempts with SIGTERM and then sends the warning. Python delivers signals to
    the main thread only; in other threads this class does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that this or another process of the run received."""
        self.at_once = False
        self._first_seconds: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (*stopping_signals(), *warning_signals()):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: installed outside Python

    def _receive(self, number: int, _frame: FrameType | None) -> None:
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


class Progress(TrainerCallback):
    """Shows a bar with the loss; if standard error is no terminal, logs a line per evaluation and per minute."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None
        self._began = self._last_line = 0.0
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = self._last_line = time.perf_counter()
        self._first_step = state.global_step
        if state.is_world_process_zero:
            if self._first_step:
                logger.info("%s: resumed at step %d of %d", self.title, self._first_step, state.max_steps)
            self.bar = tqdm(total=state.max_steps, initial=self._first_step, desc=self.title, unit="step", disable=None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        logs: dict[str, float] = rest["logs"]
        if self.bar is None:
            return
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f} nats")
        done, now = state.global_step - self._first_step, time.perf_counter()
        if not self.bar.disable or not done:
            return
        if "eval_perplexity" in logs:
            measured = f"validation perplexity {logs['eval_perplexity']:.2f}"
        elif "loss" in logs and now - self._last_line >= LINE_SECONDS:
            measured = f"loss {logs['loss']:.3f} nats"
        else:
            return
        self._last_line = now
        left = duration((now - self._began) / done * (state.max_steps - state.global_step))
        place = f"step {state.global_step} of {state.max_steps}"
        logger.info("%s: %s, %s, about %s left", self.title, place, measured, left)

    def close(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def measurements(
    model: NormFreePreTrainedModel, blocks_NT: Tensor, names: Sequence[str], *, batch_sequences: int
) -> list[tuple[str, Any]]:
    """Measure full blocks in evaluation mode, over all processes.

    A run in bf16 or fp16 also runs this forward pass in that precision, as Trainer's model does; measures compute in
    fp32 and sum in fp64.
    """
    measures = open_measures(names, model)
    measure_batches(model, blocks_of(model, blocks_NT, batch_sequences, measures), measures)
    values = values_of(measures, next(model.parameters()).device)
    return [(name, value if value.dim() else value.item()) for name, value in values.items()]
