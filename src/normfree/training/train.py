"""train(spec): one run, from corpus to saved model, resumable at any point."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from normfree.data import Corpus, prepare
from normfree.files import folder_lock, read_manifest, write_manifest
from normfree.measures import open_measures, periods_of
from normfree.measures.perplexity import evaluate_blocks
from normfree.measures.text import spread
from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.spec.run import RunSpec
from normfree.store.checkpoints import STAGING, compare_surroundings, drop_staged, make_room, publish, step_of
from normfree.store.runs import RUN_FILE, RunWriter
from normfree.training import callbacks as watch
from normfree.training.arguments import (
    check_held_out,
    check_machine,
    is_done,
    model_config,
    total_steps,
    training_arguments,
    with_less_memory,
)
from normfree.training.bf16 import products_for
from normfree.training.environment import command_line, device_name, surroundings, usable_cores, whereabouts
from normfree.training.guard import Divergence, NonFiniteError
from normfree.training.opening import model_facts, open_writer
from normfree.training.process import products_as_before, without_accelerate_variables
from normfree.training.ranks import agreed_checkpoint, main_process_first, of_the_first, state_of_processes
from normfree.training.signals import pass_on
from normfree.training.tracking import wandb_run
from normfree.training.trainer import NormFreeTrainer

logger = logging.getLogger("normfree")


class InterruptedRunError(Exception):
    """A signal ended the run: after a checkpoint at a step boundary, at once on the second one, or as it diverged."""

    def __init__(self, folder: Path, signal_number: int, saved: bool, diverged: bool = False) -> None:
        super().__init__(folder, signal_number, saved, diverged)  # all of them: it travels between processes
        self.folder = folder
        self.signal_number = signal_number
        self.saved = saved
        self.diverged = diverged

    def __str__(self) -> str:
        if self.diverged:
            return f"{self.folder} diverged in the step in which signal {self.signal_number} came: it is over"
        how = "was stopped by signal {} and saved" if self.saved else "was left at once on signal {}"
        how = how.format(self.signal_number)
        return f"{self.folder} {how}; the same command goes on from its newest checkpoint"


@products_as_before()
@without_accelerate_variables()
def train(
    spec: RunSpec,
    *,
    runs_dir: Path | str = "runs",
    cache: Path | str | None = None,
    note: str = "",
    command: str | None = None,
    progress: bool = True,
) -> Path:
    """Train one run and return its folder, RUNS_DIR/<study>/<name>.

    A finished or diverged run is left as it is; a broken one resumes from its newest sound checkpoint. A run that
    goes non-finite is recorded as diverged and returned like any other. `note` is printed on the report page, and so is
    `command`, by default the command line of this process.

    Raises ValueError when the folder holds a run with another spec, or an unfinished one with another corpus, the
    corpus is too small, fields of the model contradict each other or this machine cannot train it; InterruptedRunError
    after SIGTERM, SIGINT or SIGHUP; BlockingIOError when another process trains there; OSError when the disk is full;
    torch.OutOfMemoryError with the keys that need less memory.
    """
    folder = Path(runs_dir) / spec.study / spec.name
    NormFreeConfig(**spec.model)  # fields that contradict each other show before a corpus is prepared
    periods_of(spec.probe.measures, spec.probe.every_steps)
    state = state_of_processes(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=1))
    if of_the_first(is_done(folder, spec)):
        return folder
    check_machine(spec, _device())
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))  # torchrun's
    torch.set_num_threads(spec.train.threads or max(1, usable_cores() // on_this_machine))
    with main_process_first(timedelta(days=1)):  # the others wait for the corpus, however long that takes
        corpus = prepare(spec.data, cache=Path(cache) if cache else None, progress=progress)
    check_held_out(corpus)
    if state.is_main_process and any(corpus.facts()["dropped"].values()):
        left_out = corpus.left_out("train"), corpus.left_out("validation")
        logger.info("corpus %s; left out: %s; of held-out text: %s", corpus.fingerprint[:12], *left_out)
    steps = total_steps(spec, corpus)
    config = model_config(spec, corpus)
    with folder_lock(folder) if state.is_main_process else nullcontext():
        if of_the_first(is_done(folder, spec, corpus)):  # now with its text, or finished by another command meanwhile
            return folder
        checkpoint = agreed_checkpoint(folder / "checkpoints", spec=spec)
        if checkpoint is not None:
            compare_surroundings(checkpoint, surroundings(spec, corpus, _device()))
        writer = None
        if state.is_main_process:
            logger.info("%s: %s", spec.name, whereabouts(spec.train.precision, _device()))
            make_room(folder, model_facts(config)["parameters"], keep=spec.train.checkpoints_kept)
            facts = {"command": command or command_line(), "study_note": note, "steps": steps}
            writer = open_writer(folder, spec, corpus, config, facts, checkpoint=checkpoint, device=_device())
        tracked = nullcontext()
        if writer is not None:
            first, *later = writer.facts["sessions"]
            tracked = wandb_run(spec, corpus.fingerprint, began=first["began"], resumed=bool(later))
        try:
            with tracked:
                _Training(spec, folder, corpus, config, steps, writer).run(checkpoint)
        except InterruptedRunError as stopped:
            pass_on(stopped.signal_number)
            raise
        except BaseException as error:
            if writer is not None:
                with suppress(OSError):  # a full disk: the first error is the one to tell
                    writer.update(status="failed", error=f"{type(error).__name__}: {error}")
            raise
    return folder


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Training:
    """The objects of one run while it trains."""

    def __init__(
        self,
        spec: RunSpec,
        folder: Path,
        corpus: Corpus,
        config: NormFreeConfig,
        steps: int,
        writer: RunWriter | None,
    ) -> None:
        self.spec, self.folder, self.corpus, self.steps, self.writer = spec, folder, corpus, steps, writer
        self.checkpoints = folder / "checkpoints"
        self.skipped: list[Divergence] = []
        self.unlogged: dict[str, Any] | None = None
        self.seconds_before = writer.facts["wall_seconds"] if writer else 0.0
        self.began = time.perf_counter()
        self.tokens_per_step = spec.train.batch_sequences * spec.data.context
        self.held_out = torch.from_numpy(corpus.held_out_ids())
        set_seed(spec.seed)
        self.model = NormFreeForCausalLM(config)
        self.periods = periods_of(spec.probe.measures, spec.probe.every_steps)
        open_measures(list(self.periods), self.model)  # refuses what the model cannot serve, before it trains
        self.tell: Callable[[dict[str, float]], None]  # trackers

    def run(self, checkpoint: Path | None) -> None:
        if checkpoint:
            kept = read_manifest(checkpoint)
            self.skipped = [Divergence(**one) for one in kept["skipped_steps"]]
            self.unlogged = kept["unlogged"]
        diverged = False
        with products_for(self.spec.train.precision, _device()), watch.StopOnSignal() as stop:
            try:
                self._train(checkpoint, stop)
                stop.at_once = stop.received is None  # no step boundary is left to wait for
                if stop.agree(_device()) is None:
                    self._finish()
                else:
                    self._update(status="interrupted")
            except NonFiniteError as error:
                self._record_divergence(error.divergence)
                diverged = True
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(
                    f"{self.folder} ran out of memory on {device_name(_device())}: {with_less_memory(self.spec)}"
                ) from error
            except KeyboardInterrupt:
                self._update(status="interrupted")
                raise InterruptedRunError(self.folder, stop.received or signal.SIGINT, saved=False) from None
            finally:
                drop_staged(self.checkpoints)
        if stop.received is not None:
            raise InterruptedRunError(self.folder, stop.received, saved=True, diverged=diverged)

    def _train(self, checkpoint: Path | None, stop: watch.StopOnSignal) -> None:
        bar = watch.Progress(self.spec.name)
        trainer = self._trainer(checkpoint, [bar, stop])
        self.tell = trainer.log
        if rank := PartialState().process_index:  # else all of them would draw the dropout masks of the first
            torch.manual_seed(int(np.random.SeedSequence((self.spec.seed, rank)).generate_state(1)[0]))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            bar.close()

    def _trainer(self, checkpoint: Path | None, extra: list[TrainerCallback]) -> NormFreeTrainer:
        trainer = NormFreeTrainer(
            spec=self.spec,
            start_step=step_of(checkpoint) if checkpoint else 0,
            skipped=self.skipped,
            on_skip=self._record_skip,
            publish=self._publish,
            unlogged=self.unlogged,
            model=self.model,
            args=training_arguments(self.spec, steps=self.steps, output=self.checkpoints / STAGING),
            train_dataset=self.corpus.train.with_format("torch"),
            data_collator=_collate,
            processing_class=self.corpus.tokenizer(),
            callbacks=[watch.OwnIntervals(), watch.TrainingLog(self._log, tokens_per_step=self.tokens_per_step)],
        )
        for callback in (watch.Watch(self._log, self._schedules(), tell=trainer.log), *extra):
            trainer.add_callback(callback)  # in this order: a signal during a measurement ends the same step
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(self.folder / "tensorboard")  # Trainer's own choice is the staging folder
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _schedules(self) -> list[watch.Schedule]:
        spec, size = self.spec, self.spec.train.micro_batch_sequences
        probe_NT = spread(self.held_out, spec.probe.sequences)
        validation_NT = spread(self.held_out, spec.train.evaluation_sequences or len(self.held_out))
        names_by_period: dict[int, list[str]] = {}
        for name, every in self.periods.items():
            names_by_period.setdefault(every, []).append(name)

        def schedule(split: str, every: int, blocks_NT: Tensor, names: list[str]) -> watch.Schedule:
            measured = partial(watch.measurements, blocks_NT=blocks_NT, names=names, batch_sequences=size)
            return watch.Schedule(split, every, measured)

        return [
            *(schedule("probe", every, probe_NT, names) for every, names in names_by_period.items()),
            schedule("validation", spec.train.evaluate_every, validation_NT, ["perplexity"]),
        ]

    def _publish(self, step: int, unlogged: dict[str, Any]) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.writer is None:
            return
        facts = {
            "spec": self.spec.to_dict(),
            **surroundings(self.spec, self.corpus, _device()),
            "skipped_steps": [found.to_dict() for found in self.skipped],
            "unlogged": unlogged,
            "wall_seconds": self._wall_seconds(),
        }
        self.writer.sync()  # a checkpoint never promises metrics that a power cut could take
        publish(self.checkpoints, step, facts, keep=self.spec.train.checkpoints_kept)
        try:
            self._update(steps_done=step, tokens_seen=step * self.tokens_per_step)
        except OSError as error:
            raise RuntimeError(
                f"{self.folder / RUN_FILE} cannot be written ({error}); the checkpoint of step {step} is whole, and "
                "the same command goes on from it"
            ) from error

    def _record_skip(self, found: Divergence) -> None:
        logger.warning("%s: %s; this step is left out", self.spec.name, found)
        self._log(found.step, "train", iter([("skipped_step", len(self.skipped))]))
        self._update(skipped_steps=[one.to_dict() for one in self.skipped])

    def _record_divergence(self, found: Divergence) -> None:
        logger.warning("%s diverged: %s", self.spec.name, found)
        self._update(
            status="diverged",
            divergence=found.to_dict(),
            steps_done=found.step - 1,
            tokens_seen=(found.step - 1) * self.tokens_per_step,
        )

    def _finish(self) -> None:
        size = self.spec.train.micro_batch_sequences
        final_NT = spread(self.held_out, self.spec.probe.final_sequences)
        self._log(
            self.steps, "final", watch.measurements(self.model, final_NT, list(self.periods), batch_sequences=size)
        )
        result = evaluate_blocks(
            self.model, self.held_out, predicted_bytes=self.corpus.predicted_bytes(), batch_sequences=size
        )
        if self.writer is not None:
            _save_model(self.model, self.corpus, self.folder / "model")
        self._update(
            status="finished",
            final=result.to_dict(),
            steps_done=self.steps,
            tokens_seen=self.steps * self.tokens_per_step,
        )
        try:
            self.tell({"eval_final_loss": result.loss_nats, "eval_final_perplexity": result.perplexity})
        except Exception as error:  # whatever a tracker makes of it, the run is what its records say
            logger.warning("the trackers did not get the final perplexity: %s", error)
        PartialState().wait_for_everyone()  # whoever reads the run next finds it finished

    def _log(self, step: int, split: str, measurements: watch.Measurements) -> None:
        values = list(measurements)  # every process measures, only one writes
        if self.writer is not None:
            self.writer.log(step, split, values)

    def _update(self, **facts: Any) -> None:
        if self.writer is not None:
            self.writer.update(wall_seconds=self._wall_seconds(), **facts)

    def _wall_seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began


def _save_model(model: NormFreeForCausalLM, corpus: Corpus, folder: Path) -> None:
    """Save weights, code and tokenizer with a manifest; the folder appears whole."""
    staged = folder.with_name(".model.tmp")
    for old in (staged, folder):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(staged)
    corpus.tokenizer().save_pretrained(staged)
    write_manifest(staged, {"corpus": corpus.fingerprint})
    staged.rename(folder)


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    ids_BT = torch.stack([row["input_ids"] for row in rows]).long()
    return {"input_ids": ids_BT, "labels": ids_BT, "return_logits": False}
