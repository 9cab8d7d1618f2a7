"""Run simulator.py in the Python that has SPU: it needs Python below 3.12, an old jax and numpy 1."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

SIMULATOR = Path(__file__).with_name("simulator.py")
PYTHON = os.environ.get("NORMFREE_SPU_PYTHON") or "spu/bin/python"
INSTALL = "python3.11 -m venv spu && spu/bin/pip install 'spu==0.9.5' 'jax<=0.4.34' 'jaxlib<=0.4.34' 'numpy<2'"


def check_python(python: str) -> None:
    """Raises ValueError, with the line that makes the environment (about 1 GB), for a Python without SPU."""
    advice = f"make an environment with `{INSTALL}` and say python=spu/bin/python"
    try:
        code = "import spu.libspu, spu.utils.simulation, jax"
        subprocess.run([python, "-I", "-c", code], capture_output=True, check=True, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot run python={python} ({error.strerror}); {advice}") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"python={python} cannot import spu and jax ({reason}); {advice}") from None


def simulate(python: str, job: dict[str, Any]) -> dict[str, Any]:
    """The answer of simulator.py to one job. Raises RuntimeError when it fails."""
    done = subprocess.run(
        [python, "-I", SIMULATOR],
        input=json.dumps(job),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:  # -9: most often out of memory
        raise RuntimeError(f"simulating {job['operation']} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)
