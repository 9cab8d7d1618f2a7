"""The record of a run while it trains: run.json, metrics.jsonl, its checkpoints, and its wandb run."""

import logging
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from normfree.data import Corpus
from normfree.files import fingerprint, read_manifest
from normfree.measures import MEASURES, periods_of
from normfree.measures.measure import Measure
from normfree.model.modeling import NormFreePreTrainedModel
from normfree.spec.families import FAMILIES
from normfree.spec.run import RunSpec
from normfree.store import checkpoints
from normfree.store.quantities import describe
from normfree.store.runs import METRICS_FILE, RUN_FILE, DamagedRunError, RunWriter, read_run
from normfree.training.guard import Divergence
from normfree.training.machine import describe_environment, device_name, surroundings
from normfree.training.objectives import Objective
from normfree.training.processes import broadcast_from_rank_zero, training_device

logger = logging.getLogger("normfree")

TRAINING_LOG = ("loss", "learning_rate", "gradient_norm", "tokens_seen", "tokens_per_second")
"""Quantities of Trainer's log lines, as `RecordMetrics` writes them."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run while it trains, and its files. Every process has one; those without a writer write nothing."""

    folder: Path
    spec: RunSpec
    corpus: Corpus
    held_out_NT: Tensor
    objective: Objective
    steps: int
    checkpoint: Path | None
    """Where training goes on."""
    writer: RunWriter | None
    began: float
    """Time at which it would have begun without a break, of `time.perf_counter`."""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def log(self, step: int, split: str, values: Iterable[tuple[str, Any]]) -> None:
        """Append metrics, a (name, value) pair each."""
        if self.writer is not None:
            self.writer.log(step, split, values)

    def update(self, **facts: Any) -> None:
        if self.writer is not None:
            self.writer.update(wall_seconds=time.perf_counter() - self.began, **facts)

    def name_layers(self, measures: Iterable[Measure]) -> None:
        """Record the layers of what was measured, where they are not 0, 1, 2, ..., e.g. `encoder 0`."""
        known = self.writer.facts["quantities"] if self.writer else {}
        named = {name: [*(measure.layers or ())] for measure in measures for name in measure.gives if name in known}
        named = {name: layers for name, layers in named.items() if layers != [*range(len(layers))]}
        described = {name: {**known[name], "layers": layers} for name, layers in named.items() if known[name]["axes"]}
        if {**known, **described} != known:
            self.update(quantities={**known, **described})

    def progress_at(self, step: int) -> dict[str, int]:
        """The facts of run.json after this many steps."""
        return {"steps_done": step, "tokens_seen": step * self.spec.train.batch_sequences * self.spec.data.context}

    def write_skip(self, skipped: Sequence[Divergence]) -> None:
        """Record the last of the skipped steps."""
        logger.warning("%s: %s; this step is skipped", self.spec.name, skipped[-1])
        self.log(skipped[-1].step, "train", [("skipped_step", len(skipped))])
        self.update(skipped_steps=[asdict(divergence) for divergence in skipped])

    def write_divergence(self, divergence: Divergence) -> None:
        logger.warning("%s diverged: %s", self.spec.name, divergence)
        self.update(status="diverged", divergence=asdict(divergence), **self.progress_at(divergence.step - 1))

    def publish_checkpoint(self, step: int, skipped: Sequence[Divergence], unlogged: dict[str, Any]) -> None:
        """Publish the staged checkpoint of a step. `unlogged`: the sum of losses that no log line contains yet."""
        PartialState().wait_for_everyone()
        if self.writer is None:
            return
        facts = {
            "spec": self.spec.to_dict(),
            **surroundings(self.spec, self.corpus),
            "skipped_steps": [asdict(divergence) for divergence in skipped],
            "unlogged": unlogged,
            "objective": self.objective.state(),
            "wall_seconds": time.perf_counter() - self.began,
        }
        self.writer.sync()  # a power cut must not take metrics from before the checkpoint
        checkpoints.publish(self.checkpoints, step, facts, keep=self.spec.train.checkpoints_kept)
        self.update(**self.progress_at(step))


def open_record(
    folder: Path, spec: RunSpec, corpus: Corpus, model: NormFreePreTrainedModel, objective: Objective, **facts: Any
) -> Record:
    """Choose the checkpoint to resume from and, in the main process, start or continue the record.

    Metrics after the checkpoint are dropped; they will be measured again. `facts` are command, study_note and steps.
    """
    state, writer = PartialState(), None
    newest = checkpoints.newest_sound(folder / "checkpoints", spec=spec) if state.is_main_process else None
    checkpoint = broadcast_from_rank_zero(newest)
    if checkpoint is not None:
        checkpoints.check_sharding(checkpoint, spec.train.sharding)
        checkpoints.compare_surroundings(checkpoint, surroundings(spec, corpus))
    if state.is_main_process:
        processes, threads = state.num_processes, torch.get_num_threads()
        logger.info(
            f"{spec.name}: training on {device_name(training_device())}, {processes} process{'es' * (processes > 1)}, "
            f"{threads} thread{'s' * (threads > 1)} each, precision {spec.train.precision}"
        )
        checkpoints.remove_leftovers(folder)
        writer = RunWriter(folder, _first_facts(folder, spec, corpus, model, checkpoint, **facts))
        if damaged := writer.forget_after(checkpoints.step_of(checkpoint) if checkpoint else -1):
            numbers = ", ".join(map(str, damaged))
            logger.warning("dropped damaged line %s of %s; a copy is kept beside it", numbers, METRICS_FILE)
    return Record(
        folder=folder,
        spec=spec,
        corpus=corpus,
        held_out_NT=torch.from_numpy(corpus.held_out_ids()),
        objective=objective,
        steps=facts["steps"],
        checkpoint=checkpoint,
        writer=writer,
        began=time.perf_counter() - (writer.facts["wall_seconds"] if writer else 0.0),
    )


def _first_facts(
    folder: Path, spec: RunSpec, corpus: Corpus, model: NormFreePreTrainedModel, checkpoint: Path | None, **more: Any
) -> dict[str, Any]:
    """The content of run.json when training begins or goes on."""
    earlier, manifest, step = _read_earlier_facts(folder), {}, 0
    if checkpoint is None:
        earlier = {}  # the run starts again
    else:
        manifest, step = read_manifest(checkpoint), checkpoints.step_of(checkpoint)
        if not (folder / METRICS_FILE).exists():
            logger.warning("%s is missing: the metrics up to step %d are lost", folder / METRICS_FILE, step)
    session = {
        "from_step": step,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": more["command"],
        "environment": describe_environment(training_device()),
    }
    measures = dict.fromkeys([*FAMILIES[model.config.family].measures, *periods_of(spec.probe.measures, 1)])
    quantities = describe([*TRAINING_LOG, *(name for measure in measures for name in MEASURES[measure].gives)])
    config, slope_layers = model.config, model.slope_layers()
    if "negative_slope" in quantities and slope_layers:
        quantities["negative_slope"]["layers"] = slope_layers
    return {
        "started": earlier.get("started", session["began"]),
        "wall_seconds": earlier.get("wall_seconds", manifest.get("wall_seconds", 0.0)),
        "spec": spec.to_dict(),
        "spec_fingerprint": fingerprint(spec.to_dict()),
        **more,
        "corpus": corpus.facts(),
        "environment": session["environment"],
        "sessions": [*earlier.get("sessions", []), session],
        "model": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            **{"head_dim": config.head_dim, "hidden_size": config.hidden_size, "slope_layers": slope_layers},
        },
        "quantities": quantities,
        "steps_done": step,
        "tokens_seen": step * spec.train.batch_sequences * spec.data.context,
        "resumed": earlier.get("resumed", 0) + bool(checkpoint),
        "final": None,
        "divergence": None,
        "skipped_steps": manifest.get("skipped_steps", []),
    }


def _read_earlier_facts(folder: Path) -> dict[str, Any]:
    """Read run.json. A damaged one is renamed, because the checkpoints hold all that a resume needs."""
    if not (folder / RUN_FILE).exists():
        return {}
    try:
        return read_run(folder).facts
    except DamagedRunError as error:
        copy = folder / f"{RUN_FILE}.damaged"
        (folder / RUN_FILE).replace(copy)
        logger.warning("%s; kept as %s and written anew", error, copy)
        return {}


def wandb_run(record: Record) -> AbstractContextManager[Any]:
    """Open or resume the run's wandb run, or take the one that the caller opened; leaving the context finishes ours.

    Its id follows from the spec, the corpus and the time of the first start, unless WANDB_RUN_ID names another.
    """
    if record.writer is None or "wandb" not in record.spec.train.trackers:
        return nullcontext()
    import wandb

    if wandb.run is not None:
        return nullcontext()
    identity = [record.spec.identity(), record.corpus.fingerprint, record.writer.facts["sessions"][0]["began"]]
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "normfree"),
        name=f"{record.spec.study}/{record.spec.name}",
        id=os.environ.get("WANDB_RUN_ID") or fingerprint(identity)[:16],
        resume=os.environ.get("WANDB_RESUME") or "allow",  # pyright: ignore[reportArgumentType]
    )
