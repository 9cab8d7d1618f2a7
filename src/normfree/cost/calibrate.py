"""Measure operations again in SecretFlow SPU's simulator, beside the recorded prices.

SPU needs Python below 3.12, an old jax and numpy 1, so it lives in a virtual environment of its own and runs there as
a subprocess (docs/private-inference.md).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.config import nearest
from normfree.cost.constants import find_protocol
from normfree.cost.counts import Rows
from normfree.tables import Column, Table

SIMULATOR = Path(__file__).with_name("simulator.py")
INSTALL = "python3.11 -m venv spu && spu/bin/pip install 'spu==0.9.5' 'jax<=0.4.34' 'jaxlib<=0.4.34' 'numpy<2'"
ELEMENTS = (6144, 12288)
"""Two sizes: their difference leaves out the set-up."""
ROW_LENGTHS = {"softmax": 128, "layernorm": 768, "rmsnorm": 768}
MEASURABLE = ("relu", "gelu_tanh", "gelu_erf", "silu", "product", "public_product", *ROW_LENGTHS)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One operation, measured and as recorded, in bytes per element over both directions."""

    operation: str
    row_length: int
    bytes_per_element: float
    recorded_bytes_per_element: float
    messages: int
    """Of one party, in the smaller call; equal to rounds in SEMI2K only."""
    settings: dict[str, Any]
    """Versions and fraction bits, as the simulator reports them."""


def calibrate(python: Path, *, protocol: str = "semi2k", operations: Sequence[str] = MEASURABLE) -> list[Measured]:
    """Run the simulator with that Python, one subprocess per operation. Nothing is written.

    SEMI2K takes about two seconds per operation, CHEETAH about half a minute. Raises ValueError for an unknown
    name and for a Python in which SPU is not installed; RuntimeError when the simulator fails.
    """
    prices = find_protocol(protocol)
    for operation in operations:
        if operation not in MEASURABLE:
            raise ValueError(f"unknown operation {operation!r}; {nearest(operation, list(MEASURABLE))}")
    _check_installed(python)
    found = []
    for operation in operations:
        length = ROW_LENGTHS.get(operation, 128)
        answer = _run(python, {"protocol": protocol, "operation": operation, "shapes": _shapes(length)})
        (small, messages), (large, _) = answer.pop("traffic")
        one = Rows(layer=None, part="", operation=operation, rows=1, length=length)
        found.append(
            Measured(
                operation=operation,
                row_length=length,
                bytes_per_element=(large - small) / (ELEMENTS[1] - ELEMENTS[0]),
                recorded_bytes_per_element=prices.price(one)[0] / length,
                messages=messages,
                settings=answer,
            )
        )
    return found


def calibration_table(found: Sequence[Measured], *, protocol: str) -> Table:
    """Measured beside recorded."""
    titles = ("Row length", "Bytes per element", "Recorded", "Difference %", "Messages")
    columns = (Column("Operation", numeric=False), *map(Column, titles))
    rows = tuple(
        (
            one.operation,
            f"{one.row_length}",
            f"{one.bytes_per_element:.1f}",
            f"{one.recorded_bytes_per_element:.1f}",
            f"{100 * (one.bytes_per_element / one.recorded_bytes_per_element - 1):.1f}",
            f"{one.messages}",
        )
        for one in found
    )
    notes = tuple(dict.fromkeys(json.dumps(one.settings) for one in found))
    return Table("calibration", f"{protocol} in the SPU simulator, both directions", columns, rows, notes)


def _shapes(length: int) -> list[list[int]]:
    return [[elements // length, length] for elements in ELEMENTS]


def _check_installed(python: Path) -> None:
    try:
        done = subprocess.run([python, "-c", "import spu, jax"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"cannot run {python}: {error.strerror}; make it with: {INSTALL}") from None
    if done.returncode:
        raise ValueError(f"{python} has no SPU simulator; make an environment with: {INSTALL}")


def _run(python: Path, job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [python, SIMULATOR],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        raise RuntimeError(f"the simulator failed on {job['operation']}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)
