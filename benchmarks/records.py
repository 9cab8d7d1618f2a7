"""What every benchmark writes down: its options, the machine, its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NOT_RECORDED = {"output", "worker", "job"}
"""Options that say where a record goes or what a helper process does, and nothing about the numbers."""


def read_options(arguments: list[str], defaults: dict[str, str]) -> dict[str, str]:
    """key=value pairs over the defaults; refuses unknown keys."""
    pairs = dict(argument.partition("=")[::2] for argument in arguments)
    refuse_unknown("key", pairs, allowed=sorted(defaults))
    return defaults | pairs


def refuse_unknown(kind: str, names: Iterable[str], *, allowed: Iterable[str]) -> None:
    """End with the unknown names and those that are allowed, if any is unknown."""
    if unknown := set(names) - set(allowed):
        raise SystemExit(f"unknown {kind} {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")


def write_record(
    path: str, options: dict[str, str], results: dict[str, Any], conditions: dict[str, Any] | None = None
) -> None:
    """Write options, machine (with `conditions` at the start) and results as JSON; an empty path writes nothing."""
    if not path:
        return
    kept = {name: value for name, value in options.items() if name not in NOT_RECORDED}
    record = {"options": kept, "machine": describe_machine() | (conditions or {})} | results
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def describe_machine() -> dict[str, str]:
    """What the numbers were taken on."""
    import torch
    import transformers

    from normfree.training.machine import processor_name

    return {"processor": processor_name(), "torch": torch.__version__, "transformers": transformers.__version__}
