"""train(spec): run one training run, from corpus to saved model, resumable at any point."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor
from transformers import set_seed
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from normfree.data import Corpus, prepare
from normfree.files import folder_lock, write_manifest
from normfree.measures import open_measures, periods_of
from normfree.measures.perplexity import evaluate_blocks
from normfree.measures.text_perplexity import spread
from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.spec.run import RunSpec
from normfree.store import checkpoints
from normfree.store.runs import RunWriter, read_run
from normfree.training import arguments, callbacks
from normfree.training.bf16 import products_for
from normfree.training.card import model_card
from normfree.training.distributed import broadcast_from_rank_zero, start_processes
from normfree.training.environment import command_line, device_name, surroundings, usable_cores
from normfree.training.guard import Divergence, NonFiniteError
from normfree.training.objectives import build_objective
from normfree.training.process import hide_accelerate_variables, restore_fp32_precision
from normfree.training.record import model_facts, open_writer, wandb_run
from normfree.training.signals import warning_signals
from normfree.training.trainer import NormFreeTrainer

logger = logging.getLogger("normfree")


class InterruptedRunError(Exception):
    """A signal ended the run: after a checkpoint, at once on a second signal, or in the step in which it diverged."""

    def __init__(self, folder: Path, signal_number: int, outcome: str) -> None:
        super().__init__(folder, signal_number, outcome)  # all arguments, so that it can be pickled
        self.folder, self.signal_number, self.outcome = folder, signal_number, outcome

    def __str__(self) -> str:
        return f"{self.folder} {self.outcome}"


@restore_fp32_precision()
@hide_accelerate_variables()
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

    A finished or diverged run is left unchanged; an incomplete one resumes from its newest sound checkpoint. A run that
    becomes non-finite is recorded as diverged and returned like any other. The report page prints `note` and `command`,
    by default the command line of this process.

    Raises ValueError when the folder holds another run, the corpus is too small or has changed, or this machine cannot
    train the spec; InterruptedRunError after SIGTERM, SIGINT or SIGHUP; BlockingIOError when another process trains
    there; OSError when the disk is full; torch.OutOfMemoryError with the keys that need less memory.
    """
    folder = Path(runs_dir) / spec.study / spec.name
    NormFreeConfig(**spec.model)  # contradicting fields are reported before a corpus is prepared
    periods_of(spec.probe.measures, spec.probe.every_steps)
    state = start_processes(cpu=not torch.cuda.is_available())
    if broadcast_from_rank_zero(arguments.is_done(folder, spec)):
        return folder
    arguments.check_machine(spec, _device())
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))  # set by torchrun
    torch.set_num_threads(spec.train.threads or max(1, usable_cores() // processes_here))
    with state.main_process_first():
        corpus = prepare(spec.data, cache=Path(cache) if cache else None, progress=progress)
    if state.is_main_process and any(corpus.facts()["dropped"].values()):
        left_out = corpus.left_out("train"), corpus.left_out("validation")
        logger.info("corpus %s; left out: %s; of held-out text: %s", corpus.fingerprint[:12], *left_out)
    steps, config = arguments.total_steps(spec, corpus), arguments.model_config(spec, corpus)
    with folder_lock(folder) if state.is_main_process else nullcontext():
        if broadcast_from_rank_zero(arguments.is_done(folder, spec, corpus)):  # by another command, or with its text
            return folder
        facts = {"command": command or command_line(), "study_note": note, "steps": steps}
        checkpoint, writer = _open_record(spec, folder, corpus, config, facts)
        try:
            with wandb_run(spec, writer):
                _Training(spec, folder, corpus, config, steps, writer).run(checkpoint)
        except InterruptedRunError as stopped:
            if stopped.signal_number in warning_signals():
                signal.raise_signal(stopped.signal_number)  # now the handler may act, e.g. submitit's requeues the job
            raise
        except BaseException as error:
            if writer is not None:
                with suppress(OSError):  # the first error matters more than a full disk
                    writer.update(status="failed", error=f"{type(error).__name__}: {error}")
            raise
    return folder


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _open_record(
    spec: RunSpec, folder: Path, corpus: Corpus, config: NormFreeConfig, facts: dict[str, Any]
) -> tuple[Path | None, RunWriter | None]:
    """Choose the checkpoint to resume from and, in the main process, open the record."""
    state, device = PartialState(), _device()
    newest = checkpoints.newest_sound(folder / "checkpoints", spec=spec) if state.is_main_process else None
    checkpoint = broadcast_from_rank_zero(newest)
    if checkpoint is not None:
        checkpoints.compare_surroundings(checkpoint, surroundings(spec, corpus, device))
    if not state.is_main_process:
        return checkpoint, None
    processes, threads = state.num_processes, torch.get_num_threads()
    logger.info(
        f"{spec.name}: training on {device_name(device)}, {processes} process{'es' * (processes > 1)}, "
        f"{threads} thread{'s' * (threads > 1)} each, precision {spec.train.precision}"
    )
    model = model_facts(config)
    checkpoints.make_room(folder, model["parameters"], keep=spec.train.checkpoints_kept)
    return checkpoint, open_writer(folder, spec, corpus, model, checkpoint=checkpoint, device=device, **facts)


class _Training:
    """The state of one run while it trains."""

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
        self.seconds_before = writer.facts["wall_seconds"] if writer else 0.0
        self.began = time.perf_counter()
        self.tokens_per_step = spec.train.batch_sequences * spec.data.context
        self.held_out = torch.from_numpy(corpus.held_out_ids())
        set_seed(spec.seed)
        self.objective = build_objective(spec, config, steps)
        self.model = NormFreeForCausalLM(config)
        self.periods = periods_of(spec.probe.measures, spec.probe.every_steps)
        open_measures(list(self.periods), self.model)  # raises for measures that do not fit the model
        self.trainer: NormFreeTrainer

    def run(self, checkpoint: Path | None) -> None:
        resumes = "the same command resumes from its newest checkpoint"
        outcome = f"was stopped by signal {{}} and saved; {resumes}"
        with products_for(self.spec.train.precision, _device()), callbacks.StopOnSignal() as stop:
            try:
                self._train(checkpoint, stop)
                stop.at_once = stop.received is None  # no step boundary will follow
                if stop.agree(_device()) is None:
                    self._finish()
                else:
                    self._update(status="interrupted")
            except NonFiniteError as error:
                self._record_divergence(error.divergence)
                outcome = "diverged in the step of signal {}: the run is over"
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(
                    f"{self.folder} ran out of memory on {device_name(_device())}: the same command resumes with "
                    "train.gradient_checkpointing=true or a smaller train.micro_batch_sequences"
                ) from error
            except KeyboardInterrupt:
                self._update(status="interrupted")
                number = stop.received or signal.SIGINT
                raise InterruptedRunError(
                    self.folder, number, f"was stopped at once by signal {number}; {resumes}"
                ) from None
            finally:
                checkpoints.drop_staged(self.checkpoints)
        if stop.received is not None:
            raise InterruptedRunError(self.folder, stop.received, outcome.format(stop.received))

    def _train(self, checkpoint: Path | None, stop: callbacks.StopOnSignal) -> None:
        spec, progress = self.spec, callbacks.Progress(self.spec.name)
        self.trainer = trainer = NormFreeTrainer(
            spec=spec,
            objective=self.objective,
            checkpoint=checkpoint,
            on_skip=self._record_skip,
            publish=self._publish,
            model=self.model,
            args=arguments.training_arguments(spec, steps=self.steps, output=self.checkpoints / checkpoints.STAGING),
            train_dataset=self.corpus.train.with_format("torch"),
            data_collator=_collate,
            processing_class=self.corpus.tokenizer(),
        )
        recorder = callbacks.Recorder(
            spec, self.held_out, self._log, log_to_trackers=trainer.log, objective=self.objective
        )
        for callback in (recorder, progress, stop):  # in this order: a signal during a measurement ends the same step
            trainer.add_callback(callback)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(self.folder / "tensorboard")  # Trainer's default is the staging folder
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        if rank := PartialState().process_index:  # otherwise all ranks would draw the same dropout masks
            torch.manual_seed(int(np.random.SeedSequence((spec.seed, rank)).generate_state(1)[0]))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            progress.close()

    def _publish(self, step: int, unlogged: dict[str, Any]) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.writer is None:
            return
        facts = {
            "spec": self.spec.to_dict(),
            **surroundings(self.spec, self.corpus, _device()),
            "skipped_steps": [divergence.to_dict() for divergence in self.trainer.skipped],
            "unlogged": unlogged,
            "objective": self.objective.state(),
            "wall_seconds": self._wall_seconds(),
        }
        self.writer.sync()  # a power cut must not take metrics from before the checkpoint
        checkpoints.publish(self.checkpoints, step, facts, keep=self.spec.train.checkpoints_kept)
        self._update(steps_done=step, tokens_seen=step * self.tokens_per_step)

    def _record_skip(self, divergence: Divergence) -> None:
        logger.warning("%s: %s; this step is skipped", self.spec.name, divergence)
        self._log(divergence.step, "train", [("skipped_step", len(self.trainer.skipped))])
        self._update(skipped_steps=[skipped.to_dict() for skipped in self.trainer.skipped])

    def _record_divergence(self, divergence: Divergence) -> None:
        logger.warning("%s diverged: %s", self.spec.name, divergence)
        self._update(
            status="diverged",
            divergence=divergence.to_dict(),
            steps_done=divergence.step - 1,
            tokens_seen=(divergence.step - 1) * self.tokens_per_step,
        )

    def _finish(self) -> None:
        size = self.spec.train.micro_batch_sequences
        final_NT = spread(self.held_out, self.spec.probe.final_sequences)
        values = callbacks.measurements(self.model, final_NT, list(self.periods), batch_sequences=size)
        self._log(self.steps, "final", values)
        result = evaluate_blocks(
            self.model, self.held_out, predicted_bytes=self.corpus.predicted_bytes(), batch_sequences=size
        )
        if self.writer is not None:
            card = model_card(read_run(self.folder), result.to_dict())
            _save_model(self.model, self.corpus, card, self.folder / "model")
        self._update(
            status="finished",
            final=result.to_dict(),
            steps_done=self.steps,
            tokens_seen=self.steps * self.tokens_per_step,
        )
        try:
            self.trainer.log({"eval_final_loss": result.loss_nats, "eval_final_perplexity": result.perplexity})
        except Exception as error:  # a tracker's failure must not cost the run
            logger.warning("the trackers did not get the final perplexity: %s", error)
        PartialState().wait_for_everyone()  # every process returns after the record is complete

    def _log(self, step: int, split: str, values: Iterable[tuple[str, Any]]) -> None:
        if self.writer is not None:
            self.writer.log(step, split, values)

    def _update(self, **facts: Any) -> None:
        if self.writer is not None:
            self.writer.update(wall_seconds=self._wall_seconds(), **facts)

    def _wall_seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began


def _save_model(model: NormFreeForCausalLM, corpus: Corpus, card: str, folder: Path) -> None:
    """Save weights, code, tokenizer and model card with a manifest, atomically."""
    staged = folder.with_name(".model.tmp")
    for old in (staged, folder):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(staged)
    corpus.tokenizer().save_pretrained(staged)
    (staged / "README.md").write_text(card, encoding="utf-8")
    for file in staged.glob("*.safetensors"):
        shutil.copymode(staged / "config.json", file)  # safetensors makes files that only their owner may read
    write_manifest(staged, {"corpus": corpus.fingerprint})
    staged.rename(folder)


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    ids_BT = torch.stack([row["input_ids"] for row in rows]).long()
    return {"input_ids": ids_BT, "labels": ids_BT, "return_logits": False}
