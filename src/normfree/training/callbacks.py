"""Trainer callbacks: the records of a run, reduced over processes and written by rank 0, and its progress bar."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normfree.measures import open_measures, periods_of
from normfree.measures.held_out import blocks_of, measure_batches
from normfree.measures.measure import values_of
from normfree.measures.text_perplexity import spread
from normfree.model.modeling import NormFreePreTrainedModel
from normfree.spec.families import family_of
from normfree.store.progress import duration
from normfree.training.record import Record

logger = logging.getLogger("normfree")

LINE_SECONDS = 60.0
"""Time between two lines of progress where standard error is no terminal."""


class Schedule(NamedTuple):
    """Measures to run before the first step, every `every` steps and after the last step."""

    split: str
    every: int
    measures: list[str]
    blocks_NT: Tensor


class RecordMetrics(TrainerCallback):
    """Writes Trainer's log lines and measures held-out blocks on schedule; scalars also go to `log_to_trackers`."""

    def __init__(self, record: Record, *, log_to_trackers: Callable[[dict[str, float]], None]) -> None:
        spec, held_out_NT = record.spec, record.held_out_NT
        self.record, self.log_to_trackers = record, log_to_trackers
        self.tokens_per_step = spec.train.batch_sequences * spec.data.context
        self._steps, self._seconds, self._began = 0, 0.0, 0.0
        names_by_period: dict[int, list[str]] = {}
        for name, every in periods_of(spec.probe.measures, spec.probe.every_steps).items():
            names_by_period.setdefault(every, []).append(name)
        probe_NT = spread(held_out_NT, spec.probe.sequences)
        self.schedules = [Schedule("probe", every, names, probe_NT) for every, names in names_by_period.items()]
        validation_NT = spread(held_out_NT, spec.train.evaluation_sequences or len(held_out_NT))
        scores = [*family_of(spec.to_dict()).measures]
        self.schedules.append(Schedule("validation", spec.train.evaluate_every, scores, validation_NT))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)  # Trainer would log and save at the intervals of the checkpoint
        if state.global_step == 0:
            self._measure(state, control, self.schedules, rest["model"])

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._seconds += time.perf_counter() - self._began
        self._steps += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        last = state.global_step == state.max_steps
        due = [schedule for schedule in self.schedules if last or state.global_step % schedule.every == 0]
        self._measure(state, control, due, rest["model"])
        if any(schedule.split == "probe" for schedule in due):
            self.record.log(state.global_step, "probe", self.record.objective.values().items())

    def _measure(
        self, state: TrainerState, control: TrainerControl, due: list[Schedule], model: NormFreePreTrainedModel
    ) -> None:
        for schedule in due:
            values = measurements(self.record, model, schedule.blocks_NT, schedule.measures)
            self.record.log(state.global_step, schedule.split, values)
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
        self.record.log(state.global_step, "train", values.items())


class ShowProgress(TrainerCallback):
    """Moves a bar; where it is disabled, logs a line per evaluation and per minute."""

    def __init__(self, title: str, bar: tqdm) -> None:
        self.title, self.bar = title, bar
        self._began = self._last_line = 0.0
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = self._last_line = time.perf_counter()
        self._first_step = state.global_step
        if self._first_step:
            logger.info("%s: resumed at step %d of %d", self.title, self._first_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        logs: dict[str, float] = rest["logs"]
        done, now = state.global_step - self._first_step, time.perf_counter()
        if not self.bar.disable:
            if "loss" in logs:
                self.bar.set_postfix_str(f"loss {logs['loss']:.3f} nats")
            return
        if done and "eval_accuracy" in logs:
            measured = f"validation accuracy {100 * logs['eval_accuracy']:.1f} %"
        elif done and "eval_perplexity" in logs:
            measured = f"validation perplexity {logs['eval_perplexity']:.2f}"
        elif done and "loss" in logs and now - self._last_line >= LINE_SECONDS:
            measured = f"loss {logs['loss']:.3f} nats"
        else:
            return
        self._last_line = now
        left = duration((now - self._began) / done * (state.max_steps - state.global_step))
        step = f"step {state.global_step} of {state.max_steps}"
        logger.info("%s: %s, %s, about %s left", self.title, step, measured, left)


def measurements(
    record: Record, model: NormFreePreTrainedModel, blocks_NT: Tensor, names: Sequence[str]
) -> list[tuple[str, Any]]:
    """Measure full blocks in evaluation mode and the run's precision, over all processes; `record` names the layers."""
    measures = open_measures(names, model, record.corpus.tokenizer)
    measure_batches(model, blocks_of(model, blocks_NT, record.spec.train.micro_batch_sequences, measures), measures)
    record.name_layers(measures)
    values = values_of(measures, next(model.parameters()).device)
    return [(name, value if value.dim() else value.item()) for name, value in values.items()]
