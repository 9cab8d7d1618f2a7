"""tasks.json: how a model did on each task, item by item, beside the run.json of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfree.files import write_atomically
from normfree.store.runs import decode, encode

TASKS_FILE = "tasks.json"


def read_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by task; none if nothing was evaluated. Raises ValueError for a file that is no JSON."""
    path = folder / TASKS_FILE
    try:
        return decode(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f"{path} is not readable as JSON: remove it and evaluate again") from None


def write_tasks(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write records; those of other tasks stay. Non-finite numbers become the strings of metrics.jsonl."""
    path = folder / TASKS_FILE
    write_atomically(path, json.dumps(encode({**read_tasks(folder), **records}), allow_nan=False) + "\n")
    return path
