"""train(spec): run one training run, from corpus to saved model, resumable at any point."""

import logging
import os
import shutil
import signal
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from normfree.data import Corpus, prepare
from normfree.files import folder_lock, make_readable, write_manifest
from normfree.measures import open_measures, periods_of
from normfree.measures.perplexity import IGNORED, evaluate_blocks
from normfree.measures.text_perplexity import spread
from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.model.classification import Classifier
from normfree.model.folding import FOLDABLE, fold_norms, obstacle_to_folding
from normfree.model.modeling import NormFreePreTrainedModel
from normfree.spec.families import CLASSIFICATIONS
from normfree.spec.run import RunSpec
from normfree.store import checkpoints
from normfree.store.runs import read_run
from normfree.store.tasks import write_tasks
from normfree.training import arguments, signals
from normfree.training.callbacks import RecordMetrics, ShowProgress, measurements
from normfree.training.card import model_card
from normfree.training.corpora import LabelledCorpus, TargetCorpus
from normfree.training.guard import NonFiniteError
from normfree.training.machine import command_line, device_name, usable_cores
from normfree.training.objectives import build_objective
from normfree.training.precision import products_for, restore_fp32_precision
from normfree.training.processes import broadcast_from_rank_zero, guard_process_variables, training_device
from normfree.training.record import Record, open_record, wandb_run
from normfree.training.sharding import gather
from normfree.training.start import initial_model
from normfree.training.trainer import NormFreeTrainer

logger = logging.getLogger("normfree")


@restore_fp32_precision()
@guard_process_variables()
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

    A finished or diverged run is left unchanged; an incomplete one resumes from its newest sound checkpoint. The report
    page prints `note` and `command`, by default the command line of this process.

    Raises ValueError when the folder holds another run, the corpus is too small or has changed, or this machine cannot
    train the spec; InterruptedRunError after SIGTERM, SIGINT or SIGHUP; BlockingIOError when another process trains
    there; OSError when the disk is full; torch.OutOfMemoryError with the keys that need less memory.
    """
    folder = Path(runs_dir) / spec.study / spec.name
    NormFreeConfig(**spec.model)  # contradicting fields are reported before a corpus is prepared
    measures = list(periods_of(spec.probe.measures, spec.probe.every_steps))
    # With torchrun it waits for the other processes; preparing a corpus may take hours.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    if broadcast_from_rank_zero(arguments.is_done(folder, spec)):
        return folder
    arguments.check_machine(spec, training_device())
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))  # set by torchrun
    torch.set_num_threads(spec.train.threads or max(1, usable_cores() // processes_here))
    with folder_lock(folder) if state.is_main_process else nullcontext():  # from here on `status` shows it
        with state.main_process_first():
            corpus = prepare(spec.data, cache=Path(cache) if cache else None, progress=progress)
            if spec.train.objective in CLASSIFICATIONS:
                corpus = LabelledCorpus(corpus.folder, corpus.manifest, spec)
        if state.is_main_process and any(corpus.facts()["dropped"].values()):
            left_out = corpus.left_out("train"), corpus.left_out("validation")
            logger.info("corpus %s; left out: %s; of held-out text: %s", corpus.fingerprint[:12], *left_out)
        steps, config = arguments.total_steps(spec, corpus), arguments.model_config(spec, corpus)
        if config.family == "encoder_decoder" and not config.target_tokens:
            corpus = TargetCorpus(corpus.folder, corpus.manifest, config)
        if broadcast_from_rank_zero(arguments.is_done(folder, spec, corpus)):  # by another command, or with its text
            return folder
        arguments.announce_needs(spec, corpus, training_device())
        set_seed(spec.seed)
        objective = build_objective(spec, config, steps)
        model = initial_model(spec, config, corpus)
        open_measures(measures, model, corpus.tokenizer)  # raises for measures that do not fit the model
        facts = {"command": command or command_line(), "study_note": note, "steps": steps}
        record = open_record(folder, spec, corpus, model, objective, **facts)
        try:
            with wandb_run(record):
                _train_to_an_end(record, model, progress=progress)
        except signals.InterruptedRunError as stopped:
            if stopped.signal_number in signals.warning_signals():
                signal.raise_signal(stopped.signal_number)  # now the handler may act, e.g. submitit's requeues the job
            raise
        except BaseException as error:
            with suppress(OSError):  # the first error matters more than a full disk
                record.update(status="failed", error=f"{type(error).__name__}: {error}")
            raise
    return folder


def _train_to_an_end(record: Record, model: NormFreePreTrainedModel, *, progress: bool) -> None:
    """Train until the run is finished, has diverged or a signal stops it, and record which of them."""
    device, stop = training_device(), signals.StopOnSignal()
    numbers = (*signals.stopping_signals(), *signals.warning_signals())
    resumes = "the same command resumes from its newest checkpoint"
    outcome = f"was stopped by signal {{}} and saved; {resumes}"
    with products_for(record.spec.train.precision, device), signals.handle_signals(stop.receive, numbers):
        try:
            trainer = _make_trainer(record, model)
            _run_steps(trainer, record, stop, progress=progress)
            stop.at_once = stop.received is None  # no step boundary will follow
            if stop.agree(device) is None:
                _finish(record, model, trainer)
            else:
                record.update(status="interrupted")
        except NonFiniteError as error:
            record.write_divergence(*error.args)
            outcome = "diverged in the step of signal {}: the run is over"
        except torch.OutOfMemoryError as error:
            advice = "train.gradient_checkpointing=true or a smaller train.micro_batch_sequences"
            problem = f"{record.folder} ran out of memory on {device_name(device)}"
            raise torch.OutOfMemoryError(f"{problem}: the same command resumes with {advice}") from error
        except KeyboardInterrupt:
            record.update(status="interrupted")
            stop.received = stop.received or signal.SIGINT
            outcome = f"was stopped at once by signal {{}}; {resumes}"
        finally:
            checkpoints.drop_staged(record.checkpoints)
    if stop.received is not None:
        raise signals.InterruptedRunError(record.folder, stop.received, outcome.format(stop.received))


def _make_trainer(record: Record, model: NormFreePreTrainedModel) -> NormFreeTrainer:
    staging = record.checkpoints / checkpoints.STAGING
    trainer = NormFreeTrainer(
        record=record,
        model=model,
        args=arguments.training_arguments(record.spec, steps=record.steps, output=staging),
        train_dataset=record.corpus.train.with_format("torch"),
        data_collator=partial(_collate, model),
        processing_class=record.corpus.processor(),
    )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(record.folder / "tensorboard")  # Trainer's default is the staging folder
    return trainer


def _run_steps(trainer: NormFreeTrainer, record: Record, stop: signals.StopOnSignal, *, progress: bool) -> None:
    spec, state = record.spec, PartialState()
    if rank := state.process_index:  # otherwise all ranks would draw the same dropout masks
        torch.manual_seed(int(np.random.SeedSequence((spec.seed, rank)).generate_state(1)[0]))
    without_bar = None if progress and state.is_main_process else True  # None: where standard error is no terminal
    with tqdm(total=record.steps, initial=trainer.start_step, desc=spec.name, unit="step", disable=without_bar) as bar:
        trainer.add_callback(RecordMetrics(record, log_to_trackers=trainer.log))
        if state.is_main_process:
            trainer.add_callback(ShowProgress(spec.name, bar))
        trainer.add_callback(stop)  # the last: a signal during a measurement ends the same step
        trainer.train(resume_from_checkpoint=str(record.checkpoint) if record.checkpoint else None)


def _finish(record: Record, model: NormFreePreTrainedModel, trainer: NormFreeTrainer) -> None:
    spec, corpus, size = record.spec, record.corpus, record.spec.train.micro_batch_sequences
    logger.info("%s: measuring the trained model", spec.name)
    periods = periods_of(spec.probe.measures, spec.probe.every_steps)
    rare = [name for name, every in periods.items() if every > spec.probe.every_steps]
    others = [name for name in periods if name not in rare]
    for measures, sequences in ((others, spec.probe.final_sequences), (rare, spec.probe.sequences)):
        if measures:
            blocks_NT = spread(record.held_out_NT, sequences)
            record.log(record.steps, "final", measurements(record, model, blocks_NT, measures))
    bytes_of_text = int(corpus.predicted_bytes().sum())
    result = evaluate_blocks(model, record.held_out_NT, predicted_bytes=bytes_of_text, batch_sequences=size)
    whole_model = gather(model) if spec.train.sharding == "fsdp" else model
    final = result.to_dict()
    if PartialState().is_main_process and whole_model is not None:
        saved, folded = _without_fixed_norms(whole_model, record)
        if isinstance(corpus, LabelledCorpus) and isinstance(whole_model, Classifier):
            right = corpus.accuracy(whole_model)
            write_tasks(record.folder, {spec.train.objective: right})
            for who, name in (("model", "accuracy"), ("majority", "majority_accuracy"), ("unigram", "token_accuracy")):
                final[name] = sum(right["values"][who]) / sum(right["sizes"])
            saved = corpus.saved(whole_model)
        record.update(**folded)
        card = model_card(read_run(record.folder), final)
        _save_model(saved, corpus, card, record.folder / "model")
    record.update(status="finished", final=final, **record.progress_at(record.steps))
    scores = {name: final[name] for name in ("perplexity", "accuracy") if name in final}
    try:
        trainer.log({f"eval_final_{name}": value for name, value in ({"loss": result.loss_nats} | scores).items()})
    except Exception as error:  # a tracker's failure must not cost the run
        logger.warning("the trackers did not get the final %s: %s", " and ".join(scores), error)
    PartialState().wait_for_everyone()  # every process returns after the record is complete


@torch.no_grad()
def _without_fixed_norms(
    model: NormFreePreTrainedModel, record: Record
) -> tuple[NormFreePreTrainedModel, dict[str, dict[str, Any]]]:
    """The model to save, with norms folded that training left fixed, and what to record about that."""
    if model.config.norm not in FOLDABLE:
        return model, {}
    if obstacle := obstacle_to_folding(model.config):
        logger.warning("%s: its fixed norms stay in the saved model; %s", record.spec.name, obstacle)
        return model, {}
    with torch.random.fork_rng(devices=[]):
        in_fp32 = NormFreeForCausalLM(model.config)  # Trainer wrapped the model's own forward in autocast
    in_fp32.load_state_dict(model.state_dict())
    folded, ids_BT = fold_norms(in_fp32), record.held_out_NT[:8]
    difference = (folded(ids_BT).logits - in_fp32.eval()(ids_BT).logits).abs().max().item()
    before = model.config.to_dict()
    changed = {name: value for name, value in folded.config.to_dict().items() if value != before.get(name)}
    logger.info(
        "%s: fixed norms are folded into matrices; in fp32 logits differ by %.1e at most", record.spec.name, difference
    )
    return folded, {"folded": {"model": changed, "largest_logit_difference": difference}}


def _save_model(model: NormFreePreTrainedModel, corpus: Corpus, card: str, folder: Path) -> None:
    """Save weights, code, tokenizer or image processor, and model card with a manifest, atomically."""
    staged = folder.with_name(".model.tmp")
    for old in (staged, folder):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(staged)
    corpus.processor().save_pretrained(staged)
    (staged / "README.md").write_text(card, encoding="utf-8")
    make_readable(staged)
    write_manifest(staged, {"corpus": corpus.fingerprint})
    staged.rename(folder)


def _collate(model: NormFreePreTrainedModel, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    if "labels" in rows[0]:  # padded behind their ends
        columns = {name: [row[name].long() for row in rows] for name in rows[0]}
        padded = {name: pad_sequence(column, True, IGNORED * (name == "labels")) for name, column in columns.items()}
        return {**padded, "classes": True}
    ids_BT = torch.stack([row["input_ids"] for row in rows]).long()
    batch = {"labels": ids_BT, **model.batch_of(ids_BT)}
    return {**batch, "return_logits": False} if model.main_input_name == "input_ids" else batch
