"""Measurements of a model, recorded in the folder format of a run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normfree.store.quantities import describe
from normfree.store.runs import RUN_FILE, Run, RunWriter, read_run

STUDY = "measurements"
_IDENTITY = ("name", "tokens_sha256", "context", "sequences", "precision", "measures", "method")
"""Facts that must match for a measurement to replace an earlier one."""


def check_output(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder holds anything but this same measurement."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    old = read_run(folder).facts.get("measurement") if (folder / RUN_FILE).is_file() else None
    if old is None:
        raise ValueError(f"output={folder} holds something else; name a new or empty folder")
    if differing := [name for name in _IDENTITY if old.get(name) != facts[name]]:
        words = ", ".join("text" if name == "tokens_sha256" else name for name in differing)
        raise ValueError(f"output={folder} holds a measurement with another {words}; name a new or empty folder")


def write_measurement(
    folder: Path,
    facts: Mapping[str, Any],
    values: Mapping[str, Any],
    layers: Mapping[str, Sequence[int | str]],
    **more: Any,
) -> Run:
    """Write run.json and metrics.jsonl of a measurement, then read it back.

    `facts` describe model, text and method; `layers` are those of a quantity, as `3` or `encoder 3`; `more` are the
    facts model, command, environment and wall_seconds.
    """
    descriptions = describe(values)
    for name, numbers in layers.items():
        if list(numbers) != list(range(len(numbers))):
            descriptions[name]["layers"] = list(numbers)
    # For inputs that are not counted in tokens: keys that a row of heads sees, 1 where heads were not measured.
    ceilings = [float(nats) for nats in values.get("ceiling_nats", ()) if math.isfinite(nats)]
    label, context = facts["label"], facts["context"] or round(math.exp(max(ceilings, default=0.0)))
    record = {
        "kind": "measurement",
        "spec": {
            **{"study": STUDY, "variant": label, "label": label, "tag": "", "seed": 0, "data_seed": 0},
            "model": {"norm": None, "activation": None},
            "data": {"context": context},
            "train": {"precision": facts["precision"], "batch_sequences": 0},
        },
        "corpus": {
            **{"fingerprint": facts["tokens_sha256"], "source": facts["text"], "context": context},
            **{"vocab_size": facts["vocab_size"], "unigram_perplexity": None},
        },
        "measurement": dict(facts),
        "quantities": descriptions,
        "steps": 0,
        "steps_done": 0,
        **more,
    }
    writer = RunWriter(folder, record)
    writer.forget_after(-1)
    writer.log(0, "final", values.items())
    writer.update(status="finished")
    return read_run(folder)
