"""Execute the notebooks of docs/notebooks and store their outputs: `make notebooks`. A test executes them as well."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOKS = sorted(Path(__file__).with_name("notebooks").glob("*.ipynb"))


def execute(notebook: Path, folder: Path) -> Any:
    """The notebook with new outputs; what it trains goes into `folder`. Raises ImportError without the extra."""
    try:
        import nbformat
        from nbclient import NotebookClient
    except ImportError as error:
        raise ImportError("notebooks need their extra: .venv/bin/pip install -e '.[notebooks]'") from error
    cells = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return NotebookClient(cells, timeout=540, resources=resources, record_timing=False).execute(env=environment)


def without_progress(notebook: Any) -> Any:
    """The notebook without bars, log lines and versions, which differ from machine to machine."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and "<progress" not in output.get("data", {}).get("text/html", "")
            ]
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def main() -> None:
    for notebook in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            executed = execute(notebook, Path(folder))
        import nbformat  # part of the extra; execute() says so where it is missing

        nbformat.write(without_progress(executed), notebook)
        print(f"{notebook.name} executed")


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(str(error))
