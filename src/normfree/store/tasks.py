"""tasks.json.gz: how a model did on each task, item by item, beside the run.json of the model."""

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfree.files import write_atomically
from normfree.store.runs import decode, encode

TASKS_FILE = "tasks.json.gz"


def read_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by task; none if nothing was evaluated. Raises ValueError for a file that is no gzipped JSON."""
    path = folder / TASKS_FILE
    try:
        return decode(json.loads(gzip.decompress(path.read_bytes())))
    except FileNotFoundError:
        return {}
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path} is not readable as JSON: remove it and evaluate again") from None


def write_tasks(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write records, with values to 0.001; those of other tasks stay. Non-finite numbers become strings."""
    path = folder / TASKS_FILE
    text = json.dumps(encode({**read_tasks(folder), **records}), allow_nan=False)
    rounded = json.loads(text, parse_float=lambda number: round(float(number), 3))
    write_atomically(path, gzip.compress(json.dumps(rounded, separators=(",", ":")).encode(), mtime=0))
    return path
