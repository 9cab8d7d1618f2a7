"""What every benchmark writes down: its options, the machine, its numbers."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

NOT_RECORDED = {"output", "worker", "job"}
"""Options that say where a record goes or what a helper process does, and nothing about the numbers."""


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

    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return {"processor": processor, "torch": torch.__version__, "transformers": transformers.__version__}
