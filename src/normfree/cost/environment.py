"""SecretFlow SPU's simulator in a Python of its own: SPU needs Python below 3.12, an old jax and numpy 1."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from normfree.config import nearest

SIMULATOR = Path(__file__).with_name("simulator.py")
PYTHON_VARIABLE = "NORMFREE_SPU_PYTHON"
USUAL_PYTHON = Path("spu/bin/python")
INSTALL = "python3.11 -m venv spu && spu/bin/pip install 'spu==0.9.5' 'jax<=0.4.34' 'jaxlib<=0.4.34' 'numpy<2'"
_PROBE = "import spu.libspu, spu.utils.simulation, jax"
SIMULATED = ("cheetah", "semi2k")
"""Protocols that simulator.py runs."""


def find_python(given: Path | None) -> Path:
    """The Python of the simulator: the given one, else NORMFREE_SPU_PYTHON, else spu/bin/python.

    Raises ValueError, with the line that makes the environment, when it does not run or has no SPU.
    """
    python = (given or Path(os.environ.get(PYTHON_VARIABLE) or USUAL_PYTHON)).expanduser()
    if python.is_file():
        python = python.absolute()  # Path drops the ./ of ./python, and a bare name is looked up in PATH
    advice = f"make the environment (about 1 GB) with: {INSTALL}; then say python=spu/bin/python"
    try:
        done = subprocess.run(
            [python, "-I", "-c", _PROBE], capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except OSError as error:
        raise ValueError(f"no SPU simulator: cannot run {python} ({error.strerror}); {advice}") from None
    if done.returncode:
        raise ValueError(f"no SPU simulator: {python} cannot import spu and jax ({_ending(done)}); {advice}")
    return python


def check_simulated(protocol: str) -> None:
    """Raises ValueError, with the nearest name, for a protocol that the simulator does not run."""
    if protocol not in SIMULATED:
        raise ValueError(f"the simulator does not run protocol {protocol!r}; {nearest(protocol, list(SIMULATED))}")


def simulate(python: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The answer of simulator.py to one job, in a subprocess. Raises RuntimeError when it fails."""
    done = subprocess.run(
        [python, "-I", SIMULATOR],
        input=json.dumps(job),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        raise RuntimeError(f"the simulator failed on {job['operation']} ({_ending(done)}):\n{done.stderr[-2000:]}")
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        raise RuntimeError(f"the simulator's answer on {job['operation']} is no JSON:\n{done.stdout[-2000:]}") from None


def _ending(done: subprocess.CompletedProcess[str]) -> str:
    """How a process ended, in one line."""
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}" + (
            "; out of memory?" if done.returncode == -signal.SIGKILL else ""
        )
    return next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
