"""What is watched while a run trains. Each callback hands (name, value) pairs to the run's writer.

Values are computed on every process and reduced; only rank 0 has a writer.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normfree.measures import open_measures
from normfree.measures.held_out import blocks_of, measure_batches
from normfree.measures.measure import values_of
from normfree.model.modeling import NormFreePreTrainedModel
from normfree.training.signals import WARNINGS, stopping_signals, warning_signals

logger = logging.getLogger("normfree")

TOGETHER_SECONDS = 3.0
"""Signals this close are one request that came twice: to the process, and through a parent that hands it on."""

Measurements = Iterator[tuple[str, Any]]
Log = Callable[[int, str, Measurements], None]


class OwnIntervals(TrainerCallback):
    """Log lines and checkpoints come at the intervals of this start: Trainer goes on with those of the checkpoint."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)


class TrainingLog(TrainerCallback):
    """Writes Trainer's own log lines, with the speed of the steps alone, without loading, probing, saving."""

    def __init__(self, log: Log, *, tokens_per_step: int) -> None:
        self.log = log
        self.tokens_per_step = tokens_per_step
        self._steps, self._seconds, self._began = 0, 0.0, 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._seconds += time.perf_counter() - self._began
        self._steps += 1

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of_trainer: Any) -> None:
        logs: dict[str, float] = of_trainer["logs"]
        if "loss" in logs:
            self.log(state.global_step, "train", self._measurements(state, logs))

    def _measurements(self, state: TrainerState, logs: dict[str, float]) -> Measurements:
        yield "loss", logs["loss"]
        yield "learning_rate", logs["learning_rate"]
        if "grad_norm" in logs:
            yield "gradient_norm", logs["grad_norm"]
        yield "tokens_seen", state.global_step * self.tokens_per_step
        if self._seconds:
            yield "tokens_per_second", self._steps * self.tokens_per_step / self._seconds
        self._steps, self._seconds = 0, 0.0


@dataclass(frozen=True)
class Schedule:
    """One measurement, made before the first step, every `every` steps and after the last one."""

    split: str
    every: int
    measure: Callable[[NormFreePreTrainedModel], Measurements]


class Watch(TrainerCallback):
    """Makes the scheduled measurements, each once a step. `tell` hands those that are one number to trackers."""

    def __init__(self, log: Log, schedules: list[Schedule], *, tell: Callable[[dict[str, float]], None]) -> None:
        self.log, self.schedules, self.tell = log, schedules, tell

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of_trainer: Any
    ) -> None:
        if state.global_step == 0:
            self._measure(state, control, self.schedules, of_trainer["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of_trainer: Any
    ) -> None:
        last = state.global_step == state.max_steps
        due = [one for one in self.schedules if last or state.global_step % one.every == 0]
        self._measure(state, control, due, of_trainer["model"])

    def _measure(
        self, state: TrainerState, control: TrainerControl, due: list[Schedule], model: NormFreePreTrainedModel
    ) -> None:
        for schedule in due:
            values = list(schedule.measure(model))
            self.log(state.global_step, schedule.split, iter(values))
            numbers = {f"eval_{name}": value for name, value in values if isinstance(value, float)}
            if numbers:
                training_loss_due = control.should_log
                self.tell(numbers)
                control.should_log = training_loss_due  # Trainer takes any log line for the one that was due


class StopOnSignal(TrainerCallback):
    """SIGTERM, SIGINT or SIGHUP (not under nohup) ends training at the next step boundary, with a checkpoint.

    So do SIGUSR1 and SIGUSR2 in a SLURM job, and where somebody listens to them, as submitit does for the warning
    before a time limit; `signals.pass_on` tells the listener afterwards.

    A second SIGINT, a signal but these two some seconds after the first (SLURM preempts with SIGTERM, then sends the
    warning), or one that comes when no step will follow (`at_once`) raises KeyboardInterrupt where the program stands.
    Python delivers signals to the main thread only; in another thread this class does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """By this process, or by another one that it agreed with."""
        self.at_once = False
        self._first_seconds: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (*stopping_signals(), *warning_signals()):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed by Python

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        first, self._first_seconds = self._first_seconds, self._first_seconds or now
        late = first is not None and now - first > TOGETHER_SECONDS and number not in WARNINGS
        again = late or (first is not None and number == signal.SIGINT)
        self.received = number
        if again or self.at_once:
            raise KeyboardInterrupt

    def agree(self, device: torch.device) -> int | None:
        """The signal that any process has received, the same answer in all of them. One that comes while they ask each
        other is for the next time."""
        agreed = _highest_of_all_processes(self.received, device)
        if agreed is not None:
            self.received = agreed
        return agreed

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agree(args.device) is not None and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


class Progress(TrainerCallback):
    """One bar with the loss; where standard error is no terminal, a line at each evaluation."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None
        self._began, self._first_step = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began, self._first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", disable=None
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of_trainer: Any) -> None:
        logs: dict[str, float] = of_trainer["logs"]
        if self.bar is None:
            return
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f} nats")
        if self.bar.disable and "eval_perplexity" in logs and state.global_step > self._first_step:
            done, left = state.global_step - self._first_step, state.max_steps - state.global_step
            minutes = (time.perf_counter() - self._began) / done * left / 60
            where, perplexity = f"step {state.global_step} of {state.max_steps}", logs["eval_perplexity"]
            line = f"{self.title}: {where}, validation perplexity {perplexity:.2f}, about {minutes:.0f} min left"
            logger.info("%s", line)

    def close(self) -> None:
        """End the bar; also called when training raised."""
        if self.bar is not None:
            self.bar.close()


def measurements(
    model: NormFreePreTrainedModel, blocks_NT: Tensor, names: Sequence[str], *, batch_sequences: int
) -> Measurements:
    """What these measures find on full blocks, in evaluation mode, over all processes.

    In a run that trains in bf16 or fp16 the forward pass is in that precision too, as Trainer's model has it; measures
    compute in fp32 and add up in fp64.
    """
    measures = open_measures(names, model)
    measure_batches(model, blocks_of(model, blocks_NT, batch_sequences, measures), measures)
    for name, value in values_of(measures, next(model.parameters()).device).items():
        yield name, value if value.dim() else value.item()


def _highest_of_all_processes(signal_number: int | None, device: torch.device) -> int | None:
    if not torch.distributed.is_initialized():
        return signal_number
    number = torch.tensor(signal_number or 0, device=device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number) or None
