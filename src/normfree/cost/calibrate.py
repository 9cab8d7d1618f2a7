"""Measure operations again in SecretFlow SPU's simulator, beside the recorded prices, and put them into the constants.

CHEETAH packs elements into ciphertexts, so its prices depend on the size of a call. The reference size is ELEMENTS: of
the sizes that were tried it reproduces the recorded prices best (docs/private-inference.md).
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from normfree.config import nearest
from normfree.cost.constants import CONSTANTS_FILE, find_protocol
from normfree.cost.counts import Rows
from normfree.cost.environment import check_simulated, find_python, simulate
from normfree.tables import Column, Table

logger = logging.getLogger(__name__)

ELEMENTS = (6144, 12288)
"""Two sizes of a call: their difference leaves out the set-up."""
ROW_LENGTHS = {"softmax": (64, 512), "layernorm": (128, 768), "rmsnorm": (128, 768)}
"""Two lengths tell what a row costs from what its elements cost."""
ELEMENTWISE_LENGTHS = (128,)
MEASURABLE = ("relu", "gelu_tanh", "gelu_erf", "silu", "product", "public_product", *ROW_LENGTHS)
"""Matrix products are not measured: SEMI2K's are an exact formula, CHEETAH's are fitted to published totals."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One operation at one length of its rows, measured and as recorded, in bytes per element over both directions."""

    operation: str
    row_length: int
    bytes_per_element: float
    recorded_bytes_per_element: float | None
    """None for an operation that has no price yet."""
    rounds: int
    """Messages of one party in SEMI2K, whose simulator does not split them, whatever the protocol."""
    recorded_rounds: int | None
    settings: dict[str, Any]
    """Versions and fraction bits, as the simulator reports them."""


def calibrate(
    python: Path | None = None,
    *,
    protocol: str = "semi2k",
    operations: Sequence[str] = MEASURABLE,
    constants: Path = CONSTANTS_FILE,
) -> list[Measured]:
    """Run the simulator with that Python (`environment.find_python`), beside the prices of a file of constants.
    Nothing is written; `recalibrated` makes the new content.

    SEMI2K takes seconds for all operations, CHEETAH minutes. Raises ValueError for an unknown name and for a Python in
    which SPU is not installed; RuntimeError when the simulator fails.
    """
    prices = find_protocol(protocol, constants)
    check_simulated(protocol)
    for operation in operations:
        if operation not in MEASURABLE:
            raise ValueError(f"unknown operation {operation!r}; {nearest(operation, list(MEASURABLE))}")
    python = find_python(python)
    found = []
    for operation in operations:
        for length in ROW_LENGTHS.get(operation, ELEMENTWISE_LENGTHS):
            logger.info("%s: %s, rows of %d", protocol, operation, length)
            one = Rows(layer=None, part="", operation=operation, rows=1, length=length)
            recorded_bytes, recorded_rounds = prices.price(one) if operation in prices.operations else (None, None)
            transferred, rounds, settings = _measure(python, protocol, operation, length)
            found.append(
                Measured(
                    operation=operation,
                    row_length=length,
                    bytes_per_element=transferred,
                    recorded_bytes_per_element=None if recorded_bytes is None else recorded_bytes / length,
                    rounds=rounds,
                    recorded_rounds=recorded_rounds,
                    settings=settings,
                )
            )
    return found


def calibration_table(found: Sequence[Measured], *, protocol: str) -> Table:
    """Measured beside recorded."""
    titles = ("Row length", "Bytes per element", "Recorded", "Difference %", "Rounds", "Recorded rounds")
    columns = (Column("Operation", numeric=False), *map(Column, titles))
    rows = tuple(
        (
            one.operation,
            f"{one.row_length}",
            f"{one.bytes_per_element:.1f}",
            "-" if one.recorded_bytes_per_element is None else f"{one.recorded_bytes_per_element:.1f}",
            _difference(one),
            f"{one.rounds}",
            "-" if one.recorded_rounds is None else f"{one.recorded_rounds}",
        )
        for one in found
    )
    notes = tuple(dict.fromkeys(json.dumps(one.settings) for one in found))
    return Table("calibration", f"{protocol} in the SPU simulator, both directions", columns, rows, notes)


def _difference(one: Measured) -> str:
    if not one.recorded_bytes_per_element:  # none, or one of 0
        return "-"
    return f"{round(100 * (one.bytes_per_element / one.recorded_bytes_per_element - 1), 1) + 0:.1f}"  # no -0.0


def recalibrated(
    constants: Mapping[str, Any], found: Sequence[Measured], *, protocol: str, day: date
) -> dict[str, Any]:
    """The content of a file of constants with the measured operations in place of the recorded ones.

    They name their origin: versions, settings, the size of the calls and the day. All else stays as it was.
    """
    content = copy.deepcopy(dict(constants))
    settings = found[0].settings
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    origin = f"{protocol}-calibrated-{day.isoformat()}"
    content["origins"][origin] = (
        f"normfree cost calibrate protocol={protocol}, {day.isoformat()}: SecretFlow SPU simulator ({versions}), FM64, "
        f"{settings['fraction_bits']} fractional bits, all inputs secret, differences between calls of {ELEMENTS[0]:,} "
        f"and {ELEMENTS[1]:,} elements, row lengths {json.dumps(ROW_LENGTHS)}; rounds counted in SEMI2K"
    )
    changed = content["protocols"][protocol]
    changed["about"] = f"{changed['about'].partition('; calibrated')[0]}; calibrated {day.isoformat()} ({versions})"
    for operation, price in _prices(found):
        changed["operations"][operation] = {**price, "origin": origin}
    return content


def _measure(python: Path, protocol: str, operation: str, length: int) -> tuple[float, int, dict[str, Any]]:
    """(bytes per element, rounds, settings): bytes in the protocol, rounds in SEMI2K."""
    shapes = [[elements // length, length] for elements in ELEMENTS]
    answer = simulate(python, {"protocol": protocol, "operation": operation, "shapes": shapes})
    (small, rounds, _), (large, _, _) = answer.pop("traffic")
    if protocol != "semi2k":
        counted = simulate(python, {"protocol": "semi2k", "operation": operation, "shapes": shapes[:1]})
        rounds = counted["traffic"][0][1]
    return (large - small) / (ELEMENTS[1] - ELEMENTS[0]), rounds, answer


def _prices(found: Sequence[Measured]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(operation, price): a row costs `bytes_per_row + length * bytes_per_element`, a line through two lengths."""
    groups: dict[str, list[Measured]] = {}
    for one in found:
        groups.setdefault(one.operation, []).append(one)
    for operation, (short, *longer) in groups.items():
        per_element, per_row, each_doubling = short.bytes_per_element, 0.0, 0
        for long in longer:
            rows = [one.row_length * one.bytes_per_element for one in (short, long)]
            per_element = (rows[1] - rows[0]) / (long.row_length - short.row_length)
            per_row = rows[0] - short.row_length * per_element
            each_doubling = round((long.rounds - short.rounds) / (_doublings(long) - _doublings(short)))
        price = {
            "bytes_per_element": round(per_element, 3),
            "bytes_per_row": round(per_row, 3),
            "rounds": short.rounds - each_doubling * _doublings(short),
        }
        yield operation, price | ({"rounds_per_row_doubling": each_doubling} if each_doubling else {})


def _doublings(one: Measured) -> int:
    return (one.row_length - 1).bit_length()
