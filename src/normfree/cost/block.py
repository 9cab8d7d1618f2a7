"""One block with its real weights in the SPU simulator: what it sends beside what our prices predict.

Arrays come from the caller, so that nothing here needs torch (`normfree.simulate` takes them from a run).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from normfree.cost.counts import Matmul
from normfree.cost.environment import simulate
from normfree.cost.totals import Cost
from normfree.tables import Column, Table

# T tokens, E hidden size

COPIES = {"cheetah": (1, 2), "semi2k": (1,)}
"""CHEETAH has a set-up of many megabytes: a program with two blocks less one with one block leaves it out."""


@dataclass(frozen=True, kw_only=True)
class BlockInputs:
    """What the simulator needs to run one block of ours."""

    arrays: Mapping[str, np.ndarray]
    """`hidden` (T, E), weights by their names in the block, `slope` where it is learnt, and public `cosines` and
    `sines` (T, R) with rotary positions. The scale of the scores is folded into the query weights."""
    settings: Mapping[str, Any]
    """norm, norm_epsilon, activation, negative_slope, heads, residual."""
    output_TE: np.ndarray
    """What PyTorch makes of it."""


@dataclass(frozen=True, kw_only=True)
class BlockMeasured:
    """One block, measured and predicted. Bytes are of both directions."""

    protocol: str
    layer: int
    tokens: int
    bytes: int
    product_bytes: int
    """Of matrix products, a part of `bytes`."""
    setup_bytes: int
    """Once per connection, on top of `bytes`; 0 in SEMI2K."""
    rounds: int
    """Messages of one party in SEMI2K, whatever the protocol."""
    predicted_bytes: float
    predicted_product_bytes: float
    predicted_rounds: int
    largest_error: float
    """Against PyTorch, absolute, over all tokens and features."""
    largest_output: float
    settings: Mapping[str, Any]
    """Versions and fraction bits, as the simulator reports them."""

    def to_table(self) -> Table:
        """Measured beside predicted."""
        others = (self.bytes - self.product_bytes, self.predicted_bytes - self.predicted_product_bytes)
        rows = (
            _row("MB, matrix products", self.product_bytes / 1e6, self.predicted_product_bytes / 1e6),
            _row("MB, everything else", others[0] / 1e6, others[1] / 1e6),
            _row("MB, the block", self.bytes / 1e6, self.predicted_bytes / 1e6),
            _row("Rounds (SEMI2K)", self.rounds, self.predicted_rounds),
        )
        titles = (Column("", numeric=False), *map(Column, ("Measured", "Predicted", "Measured / predicted")))
        caption = f"Layer {self.layer} on {self.tokens} tokens in the SPU simulator, {self.protocol}, both directions"
        setup = f"The set-up, once per connection, is another {self.setup_bytes / 1e6:.1f} MB and is not in the table."
        notes = ((setup,) if self.setup_bytes else ()) + (json.dumps(self.settings),)
        return Table("block", caption, titles, rows, notes)


def simulate_block(python: Path, inputs: BlockInputs, cost: Cost, *, layer: int) -> BlockMeasured:
    """Run one block with that Python. `cost` is of the same model, protocol and number of tokens.

    Raises RuntimeError when the simulator fails.
    """
    protocol = cost.protocol.name
    answer, output_TE = _run(python, inputs, protocol, COPIES[protocol])
    first, *further = answer.pop("traffic")
    total, rounds, products = (
        (second - one for one, second in zip(first, further[0], strict=True)) if further else first
    )
    if protocol != "semi2k":
        rounds = _run(python, inputs, "semi2k", (1,))[0]["traffic"][0][1]
    items = [item for item in cost.items if item.count.layer == layer]
    return BlockMeasured(
        protocol=protocol,
        layer=layer,
        tokens=cost.context,
        bytes=total,
        product_bytes=products,
        setup_bytes=first[0] - total,
        rounds=rounds,
        predicted_bytes=sum(item.bytes for item in items),
        predicted_product_bytes=sum(item.bytes for item in items if isinstance(item.count, Matmul)),
        predicted_rounds=sum(item.rounds for item in items),
        largest_error=float(np.abs(output_TE - inputs.output_TE).max()),
        largest_output=float(np.abs(inputs.output_TE).max()),
        settings=answer,
    )


def _run(
    python: Path, inputs: BlockInputs, protocol: str, copies: tuple[int, ...]
) -> tuple[dict[str, Any], np.ndarray]:
    with TemporaryDirectory() as folder:
        job = {
            "protocol": protocol,
            "operation": "block",
            "copies": copies,
            "settings": dict(inputs.settings),
            "inputs": str(Path(folder) / "inputs.npz"),
            "output": str(Path(folder) / "output.npz"),
        }
        np.savez(job["inputs"], allow_pickle=False, **inputs.arrays)
        answer = simulate(python, job)
        return answer, np.load(job["output"])["output"]


def _row(name: str, measured: float, predicted: float) -> tuple[str, ...]:
    shown = (f"{measured}", f"{predicted}") if isinstance(measured, int) else (f"{measured:.2f}", f"{predicted:.2f}")
    return name, *shown, f"{measured / predicted:.3f}"
