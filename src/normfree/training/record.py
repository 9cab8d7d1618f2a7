"""Start the records of a run, or continue them from a checkpoint: run.json, metrics.jsonl, and wandb's."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from normfree.data import Corpus
from normfree.files import fingerprint, read_manifest
from normfree.measures import MEASURES, periods_of
from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.spec.run import RunSpec
from normfree.store.checkpoints import step_of
from normfree.store.quantities import describe
from normfree.store.runs import METRICS_FILE, RUN_FILE, DamagedRunError, RunWriter, read_run
from normfree.training.environment import environment

logger = logging.getLogger("normfree")

TRAINING_LOG = ("loss", "learning_rate", "gradient_norm", "tokens_seen", "tokens_per_second")
"""Quantities of Trainer's log lines, as `Recorder` writes them."""


def open_writer(
    folder: Path,
    spec: RunSpec,
    corpus: Corpus,
    model: dict[str, Any],
    *,
    checkpoint: Path | None,
    device: torch.device,
    **more: Any,
) -> RunWriter:
    """Start or continue the record of a run. Metrics after the checkpoint are dropped; they will be measured again.

    `more` are the facts command, study_note and steps.
    """
    earlier, manifest, step = _read_earlier_facts(folder), {}, 0
    if checkpoint is None:
        earlier = {}  # the run starts again
    else:
        manifest, step = read_manifest(checkpoint), step_of(checkpoint)
        if not (folder / METRICS_FILE).exists():
            logger.warning("%s is missing: the metrics up to step %d are lost", folder / METRICS_FILE, step)
    session = {
        "from_step": step,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": more["command"],
        "environment": environment(device),
    }
    measures = dict.fromkeys(["perplexity", *periods_of(spec.probe.measures, 1)])
    quantities = describe([*TRAINING_LOG, *(name for measure in measures for name in MEASURES[measure].gives)])
    if "negative_slope" in quantities and model["slope_layers"]:
        quantities["negative_slope"]["layers"] = model["slope_layers"]
    facts = {
        "started": earlier.get("started", session["began"]),
        "wall_seconds": earlier.get("wall_seconds", manifest.get("wall_seconds", 0.0)),
        "spec": spec.to_dict(),
        "spec_fingerprint": fingerprint(spec.to_dict()),
        **more,
        "corpus": corpus.facts(),
        "environment": session["environment"],
        "sessions": [*earlier.get("sessions", []), session],
        "model": model,
        "quantities": quantities,
        "steps_done": step,
        "tokens_seen": step * spec.train.batch_sequences * spec.data.context,
        "resumed": earlier.get("resumed", 0) + bool(checkpoint),
        "final": None,
        "divergence": None,
        "skipped_steps": manifest.get("skipped_steps", []),
    }
    writer = RunWriter(folder, facts)
    if damaged := writer.forget_after(step if checkpoint else -1):
        numbers = ", ".join(map(str, damaged))
        logger.warning("dropped damaged line %s of %s; a copy is kept beside it", numbers, METRICS_FILE)
    return writer


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


@contextmanager
def wandb_run(spec: RunSpec, writer: RunWriter | None) -> Iterator[None]:
    """Open or resume the wandb run of a training run, and finish it.

    Its id follows from the spec, the corpus and the time of the first start. WANDB_RUN_ID, WANDB_RESUME and
    WANDB_PROJECT are respected, and a wandb run that the caller opened is used and left open.
    """
    if writer is None or "wandb" not in spec.train.trackers:
        yield
        return
    import wandb

    if wandb.run is not None:
        yield
        return
    identity = [spec.identity(), writer.facts["corpus"]["fingerprint"], writer.facts["sessions"][0]["began"]]
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", "huggingface"),
        name=f"{spec.study}/{spec.name}",
        id=os.environ.get("WANDB_RUN_ID") or fingerprint(identity)[:16],
        resume=os.environ.get("WANDB_RESUME") or "allow",  # pyright: ignore[reportArgumentType]
    ):
        yield


def model_facts(config: NormFreeConfig) -> dict[str, Any]:
    """Describe the model for run.json, without allocating weights."""
    with torch.device("meta"):
        model = NormFreeForCausalLM(config)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "slope_layers": model.slope_layers(),
    }
