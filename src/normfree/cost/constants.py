"""The prices: bytes and rounds of each operation under a protocol, and networks, from a versioned JSON file.

Every price names its origin. Bytes are summed over both directions; rounds are messages in a row.
"""

import json
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
        """(bytes over both directions, rounds) of one call. Raises NoPriceError, or ValueError for half a price."""
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
            return transferred, price["rounds"] + price.get("rounds_per_row_doubling", 0) * levels
        except KeyError as error:
            raise ValueError(f"the price of {self.name}.{item.operation} has no {error}") from None


def load_constants(path: Path | str = CONSTANTS_FILE) -> dict[str, Any]:
    """The content of a file of constants. Raises ValueError for any other file or version."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r}, not {VERSION}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        advice = "name a file of constants (docs/private-inference.md, Measuring again)"
        raise ValueError(f"constants={path} cannot be read ({error}); {advice}") from None
    return content


def find_protocol(name: str, constants: Path | str = CONSTANTS_FILE) -> Protocol:
    """Prices of a protocol. Raises ValueError with the nearest valid name, or with the reason why it has no prices."""
    content = load_constants(constants)
    known, reasons = content["protocols"], content.get("unpriced", {})
    if name in reasons and name not in known:
        raise NoPriceError(f"protocol={name} has no prices: {reasons[name]}; allowed: {', '.join(known)}")
    return build(Protocol, {"name": name, **_named("protocol", name, known)})


def find_network(name: str, constants: Path | str, **replaced: float | None) -> Network:
    """A network of the file, with these of its fields replaced. Raises ValueError with the nearest valid name."""
    recorded = _named("network", name, load_constants(constants)["networks"])
    return build(Network, {"name": name, **recorded, **{k: v for k, v in replaced.items() if v is not None}})


def _named(kind: str, name: str, known: dict[str, Any]) -> dict[str, Any]:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; {nearest(name, list(known))}")
    return known[name]
