"""The prices: bytes and rounds of each operation under a protocol, and networks, from a versioned JSON file.

Every price names its origin. Bytes are summed over both directions; rounds are messages in a row.
"""

import json
import math
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from normfree.cost.counts import Count, Matmul
from normfree.cost.families import NoPriceError
from normfree.spec.keys import build, nearest
from normfree.spec.run import NotNegative, Positive

CONSTANTS_FILE = Path(__file__).with_name("constants.json")
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Network:
    """A link that carries both directions at once."""

    name: str
    bandwidth_mbps: Positive  # megabits per second in each direction
    delay_ms: NotNegative  # time from sending a message to its arrival


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Prices of one protocol."""

    name: str
    about: str
    rounds_origin: str
    operations: dict[str, dict[str, Any]]  # bytes per element, row or side of a product, and rounds

    def price(self, item: Count) -> tuple[float, int]:
        """(bytes over both directions, rounds) of one call.

        Raises NoPriceError for an operation without a price, ValueError for a price that is incomplete or below 0.
        """
        if item.operation not in self.operations:
            known = nearest(item.operation, list(self.operations))
            raise NoPriceError(f"{self.name} has no price for {item.operation!r}; {known}")
        price = self.operations[item.operation]
        if isinstance(item, Matmul):
            sizes, levels = {"left_element": item.left, "right_element": item.right, "result_element": item.elements}, 0
        else:  # the maximum of a row is a tree of comparisons, one level per doubling of the row
            sizes, levels = {"element": item.elements, "row": item.rows}, (item.length - 1).bit_length()
        try:
            transferred = sum(price[f"bytes_per_{name}"] * size for name, size in sizes.items())
            rounds = price["rounds"] + price.get("rounds_per_row_doubling", 0) * levels
        except (KeyError, TypeError) as error:
            raise ValueError(f"the price of {self.name}.{item.operation} is incomplete or no number: {error}") from None
        if not (0 <= transferred < math.inf and isinstance(rounds, int) and rounds >= 0):
            raise ValueError(f"{self.name}.{item.operation} would cost {transferred:,.0f} bytes and {rounds} rounds")
        return transferred, rounds


def load_constants(path: Path | str = CONSTANTS_FILE) -> dict[str, Any]:
    """The content of a file of constants. Raises ValueError for any other file or version."""
    advice = "name a file of constants (docs/private-inference.md, Measuring again)"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        version = content["version"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"constants={path} cannot be read ({error}); {advice}") from None
    if version != VERSION:
        raise ValueError(f"constants={path} has version {version!r}, not {VERSION}; {advice}")
    return content


def find_protocol(name: str, constants: Path | str = CONSTANTS_FILE) -> Protocol:
    """Prices of a protocol. Raises ValueError with the nearest valid name, or with the reason why it has no prices."""
    content = load_constants(constants)
    known, reasons = content["protocols"], content.get("unpriced", {})
    if name in reasons and name not in known:
        raise NoPriceError(f"protocol={name} has no prices: {reasons[name]}; allowed: {', '.join(known)}")
    return build(Protocol, {"name": name, **_named("protocol", name, known)})


def find_network(
    name: str,
    *,
    bandwidth_mbps: float | None = None,
    delay_ms: float | None = None,
    constants: Path | str = CONSTANTS_FILE,
) -> Network:
    """A network of the file, with its bandwidth or delay replaced. Raises ValueError with the nearest valid name."""
    recorded = _named("network", name, load_constants(constants)["networks"])
    replaced = {"bandwidth_mbps": bandwidth_mbps, "delay_ms": delay_ms}
    return build(Network, {"name": name, **recorded, **{k: v for k, v in replaced.items() if v is not None}})


def _named(kind: str, name: str, known: dict[str, Any]) -> dict[str, Any]:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; {nearest(name, list(known))}")
    return known[name]
