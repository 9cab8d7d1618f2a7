"""How the record of a run begins, or goes on from a checkpoint."""

from __future__ import annotations

import logging
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
"""Quantities of the lines that `TrainingLog` writes."""


def open_writer(
    folder: Path,
    spec: RunSpec,
    corpus: Corpus,
    config: NormFreeConfig,
    given: dict[str, Any],
    *,
    checkpoint: Path | None,
    device: torch.device,
) -> RunWriter:
    """Begin or continue the records of a run; metrics after the checkpoint are dropped, they will come again.

    `given` are the facts command, study_note and steps.
    """
    measures = ("perplexity", *(name for name in periods_of(spec.probe.measures, 1) if name != "perplexity"))
    earlier = _earlier_facts(folder)
    kept = read_manifest(checkpoint) if checkpoint else {}
    if checkpoint and not (folder / METRICS_FILE).exists():
        logger.warning("%s is missing: the metrics up to step %d are lost", folder / METRICS_FILE, step_of(checkpoint))
    session = {
        "from_step": step_of(checkpoint) if checkpoint else 0,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": given["command"],
        "environment": environment(device),
    }
    model = model_facts(config)
    quantities = describe([*TRAINING_LOG, *(name for measure in measures for name in MEASURES[measure].gives)])
    if "negative_slope" in quantities and model["slope_layers"]:
        quantities["negative_slope"]["layers"] = model["slope_layers"]
    facts = {
        "started": earlier.get("started", session["began"]),
        "wall_seconds": earlier.get("wall_seconds", kept.get("wall_seconds", 0.0)) if checkpoint else 0.0,
        "spec": spec.to_dict(),
        "spec_fingerprint": fingerprint(spec.to_dict()),
        **given,
        "corpus": corpus.facts(),
        "environment": session["environment"],
        "sessions": [*(earlier.get("sessions", []) if checkpoint else []), session],
        "model": model,
        "quantities": quantities,
        "steps_done": session["from_step"],
        "tokens_seen": session["from_step"] * spec.train.batch_sequences * spec.data.context,
        "resumed": earlier.get("resumed", 0) + bool(checkpoint),
        "final": None,
        "divergence": None,
        "skipped_steps": kept.get("skipped_steps", []),
    }
    writer = RunWriter(folder, facts)
    if damaged := writer.forget_after(step_of(checkpoint) if checkpoint else -1):
        numbers = ", ".join(map(str, damaged))
        logger.warning("dropped damaged line %s of %s; the file as found lies beside it", numbers, METRICS_FILE)
    return writer


def _earlier_facts(folder: Path) -> dict[str, Any]:
    """What run.json says so far; a damaged one is set aside, since checkpoints hold all that a resume needs."""
    if not (folder / RUN_FILE).exists():
        return {}
    try:
        return read_run(folder).facts
    except DamagedRunError as error:
        place = folder / f"{RUN_FILE}.damaged"
        (folder / RUN_FILE).replace(place)
        logger.warning("%s; set aside as %s and written anew", error, place)
        return {}


def model_facts(config: NormFreeConfig) -> dict[str, Any]:
    """What run.json says of the model; no weights are made."""
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
