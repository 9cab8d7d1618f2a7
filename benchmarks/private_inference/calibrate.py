"""Measure prices again in SPU's simulator and write them into a file of constants for `normfree cost`.

    python -m benchmarks.private_inference.calibrate python=spu/bin/python   # SEMI2K: 11 seconds
    python -m benchmarks.private_inference.calibrate python=spu/bin/python protocol=cheetah \
        constants=constants.json output=constants.json                       # adds CHEETAH: about three minutes

constants= is the file whose other numbers stay (default: the package's own). Matrix products are not measured:
SEMI2K's prices are an exact formula, CHEETAH's are fitted to published totals. The table to expect is in
docs/private-inference.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.private_inference.simulation import PYTHON, check_python, simulate
from benchmarks.records import read_options
from normfree.cli.options import check_writable
from normfree.cost.constants import CONSTANTS_FILE, Protocol, find_protocol, load_constants
from normfree.cost.counts import Rows
from normfree.files import write_atomically
from normfree.report.tables.table import Table, to_markdown

DEFAULTS = {"python": PYTHON, "protocol": "semi2k", "constants": "", "output": "constants.json"}
ELEMENTS = (6144, 12288)
"""Two sizes of a call: their difference leaves out the set-up. CHEETAH packs elements into ciphertexts, so its prices
depend on the size; of those that were tried this pair reproduces the recorded prices best."""
ROW_LENGTHS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("relu", "gelu_tanh", "gelu_erf", "silu", "product", "public_product"), (128,)),
    "softmax": (64, 512),
    "layernorm": (128, 768),
    "rmsnorm": (128, 768),
}
"""Two lengths tell what a row costs from what its elements cost."""


@dataclass(frozen=True)
class Measured:
    """One operation at one length of its rows."""

    operation: str
    row_length: int
    bytes_per_element: float
    """Over both directions."""
    rounds: int
    """Messages of one party in SEMI2K, whose simulator does not split them, whatever the protocol."""

    @property
    def doublings(self) -> int:
        return (self.row_length - 1).bit_length()


def main(arguments: list[str]) -> None:
    options = read_options(arguments, DEFAULTS)
    protocol, python, output = options["protocol"], options["python"], Path(options["output"])
    constants = Path(options["constants"] or CONSTANTS_FILE)
    if output.exists() and not (options["constants"] and output.resolve() == constants.resolve()):
        raise ValueError(f"output={output} exists: add constants={output} to replace numbers in it, or name another")
    check_writable(output.parent)  # before the work, not after it
    content, recorded = load_constants(constants), find_protocol(protocol, constants)
    check_python(python)
    measured, settings = measure_operations(python, protocol)
    replace_prices(content, measured, protocol, settings)
    write_atomically(output, json.dumps(content, indent=1) + "\n")
    print(to_markdown(compare(measured, recorded, settings)))
    print(f"The constants: {output}; use them with `normfree cost MODEL constants={output}`")


def measure_operations(python: str, protocol: str) -> tuple[list[Measured], str]:
    """Every operation at each of its row lengths, and the simulator's settings: bytes in the protocol, rounds in
    SEMI2K."""
    measured, settings = [], ""
    for operation, lengths in ROW_LENGTHS.items():
        for length in lengths:
            print(f"{protocol}: {operation}, rows of {length}", file=sys.stderr)
            job = {"protocol": protocol, "operation": operation, "shapes": [[n // length, length] for n in ELEMENTS]}
            answer = simulate(python, job)
            (small, rounds, _), (large, _, _) = answer["traffic"]
            if protocol != "semi2k":
                job |= {"protocol": "semi2k", "shapes": job["shapes"][:1]}
                ((_, rounds, _),) = simulate(python, job)["traffic"]
            measured.append(Measured(operation, length, (large - small) / (ELEMENTS[1] - ELEMENTS[0]), rounds))
            settings = answer["settings"]
    return measured, settings


def compare(measured: Sequence[Measured], recorded: Protocol, settings: str) -> Table:
    """Measured beside recorded; an operation may have no price yet, or one of 0."""
    rows = []
    for one in measured:
        before, difference, rounds_before = "-", "-", "-"
        if one.operation in recorded.operations:
            row = Rows(layer=None, part="", operation=one.operation, rows=1, length=one.row_length)
            row_bytes, rounds = recorded.price(row)
            before, rounds_before = f"{row_bytes / one.row_length:.1f}", f"{rounds}"
            if row_bytes:
                difference = f"{100 * (one.bytes_per_element * one.row_length / row_bytes - 1):z.1f}"
        sent = (f"{one.bytes_per_element:.1f}", before, difference)
        rows.append((one.operation, f"{one.row_length}", *sent, f"{one.rounds}", rounds_before))
    titles = ("Row length", "Bytes per element", "Recorded", "Difference %", "Rounds", "Recorded rounds")
    caption = f"{recorded.name} in the SPU simulator, both directions"
    return Table("calibration", caption, ("Operation", *titles), rows, (settings,))


def replace_prices(content: dict[str, Any], measured: Sequence[Measured], protocol: str, settings: str) -> None:
    """Put the measured prices, with their origin, into the content of a file of constants; all else stays."""
    today = date.today().isoformat()
    origin = f"{protocol}-calibrated-{today}"
    content["origins"][origin] = (
        f"benchmarks.private_inference.calibrate protocol={protocol}, {today}: SecretFlow SPU simulator ({settings}), "
        f"all inputs secret, differences between calls of {ELEMENTS[0]:,} and {ELEMENTS[1]:,} elements, row lengths "
        f"{json.dumps(ROW_LENGTHS)}; rounds counted in SEMI2K"
    )
    changed = content["protocols"][protocol]
    changed["about"] = f"{changed['about'].partition('; calibrated')[0]}; calibrated {today} ({settings})"
    for operation in ROW_LENGTHS:
        price = price_of([one for one in measured if one.operation == operation])
        changed["operations"][operation] = {**price, "origin": origin}


def price_of(lengths: Sequence[Measured]) -> Mapping[str, float]:
    """A row costs `bytes_per_row + length * bytes_per_element`: a line through the shortest and the longest row."""
    short, long = lengths[0], lengths[-1]
    per_element, per_row, per_doubling = short.bytes_per_element, 0.0, 0
    if long is not short:
        short_row, long_row = (one.row_length * one.bytes_per_element for one in (short, long))
        per_element = (long_row - short_row) / (long.row_length - short.row_length)
        per_row = short_row - short.row_length * per_element
        per_doubling = round((long.rounds - short.rounds) / (long.doublings - short.doublings))
    price = {
        "bytes_per_element": round(per_element, 3),
        "bytes_per_row": round(per_row, 3),
        "rounds": short.rounds - per_doubling * short.doublings,
    }
    return price | ({"rounds_per_row_doubling": per_doubling} if per_doubling else {})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
