"""The prices: bytes and rounds of each operation under a protocol, and networks, from a versioned JSON file.

Every number in the file names its origin. Bytes are summed over both directions; rounds are messages in a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.cost.counts import PRODUCTS, Count, Matmul, Rows
from normfree.cost.families import NoPriceError
from normfree.spec.keys import nearest

CONSTANTS_FILE = Path(__file__).with_name("constants.json")
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Network:
    """A link that carries both directions at once."""

    name: str
    bandwidth_mbps: float
    """Megabits per second in each direction."""
    delay_ms: float
    """From sending a message to its arrival."""

    def __post_init__(self) -> None:
        if not (_is_number(self.bandwidth_mbps) and self.bandwidth_mbps > 0):
            raise ValueError(f"bandwidth_mbps={self.bandwidth_mbps!r} must be a number above 0")
        if not (_is_number(self.delay_ms) and self.delay_ms >= 0):
            raise ValueError(f"delay_ms={self.delay_ms!r} must be a number, 0 or more")

    def seconds_at_least(self, transferred_bytes: float, rounds: int) -> float:
        """No run that sends so much and waits so often can be faster: the busier direction carries half of the bytes or
        more, and rounds wait in turn."""
        return transferred_bytes / 2 * 8 / (self.bandwidth_mbps * 1e6) + rounds * self.delay_ms / 1e3


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Prices of one protocol."""

    name: str
    about: str
    rounds_origin: str
    operations: Mapping[str, Mapping[str, Any]]

    def price(self, item: Count) -> tuple[float, int]:
        """(bytes over both directions, rounds) of one call. Raises NoPriceError for an operation without one, and
        ValueError where a price that begins below 0 makes the call cost less than nothing."""
        if item.operation not in self.operations:
            raise NoPriceError(
                f"{self.name} has no price for {item.operation!r}, and nothing counts as free; "
                f"{nearest(item.operation, list(self.operations))}"
            )
        price = self.operations[item.operation]
        if isinstance(item, Matmul):
            sizes = {"left": item.left, "right": item.right, "result": item.elements}
            transferred = sum(price[f"bytes_per_{side}_element"] * size for side, size in sizes.items())
        else:
            transferred = price["bytes_per_element"] * item.elements + price["bytes_per_row"] * item.rows
        if transferred < 0:
            raise ValueError(f"{self.name}.{item.operation} would cost {transferred:,.0f} bytes for {item}")
        return transferred, price["rounds"] + _tree_rounds(price, item)


def _tree_rounds(price: Mapping[str, Any], item: Count) -> int:
    """The maximum of a row is a tree of comparisons, one level per doubling of the row."""
    each = price.get("rounds_per_row_doubling", 0)
    return each * (item.length - 1).bit_length() if isinstance(item, Rows) else 0


def load_constants(path: Path | str = CONSTANTS_FILE) -> dict[str, Any]:
    """The content of a file of constants. Raises ValueError for a file that is none, and for another version."""
    path, advice = Path(path), "name a file of constants (docs/private-inference.md, Measuring again)"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"constants={path} does not exist; {advice}") from None
    except OSError as error:
        raise ValueError(f"constants={path} cannot be read ({error.strerror}); {advice}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"constants={path} is not readable as JSON; {advice}") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise ValueError(f"{path} has version {version!r}; this normfree reads version {VERSION}")
    if missing := [key for key in ("origins", "protocols", "networks") if not isinstance(content.get(key), dict)]:
        raise ValueError(f"constants={path} has no {missing[0]!r}; {advice}")
    return content


def find_protocol(name: str, constants: Path | str = CONSTANTS_FILE) -> Protocol:
    """Prices of a protocol. Raises ValueError with the nearest valid name."""
    known = load_constants(constants)["protocols"]
    if name not in known:
        raise ValueError(f"unknown protocol {name!r}; {nearest(name, list(known))}")
    return _checked(name, known[name], place=f"constants={constants}: {name}")


_PRICE_OF_ROWS = ("bytes_per_element", "bytes_per_row", "rounds")
_PRICE_OF_PRODUCTS = ("bytes_per_left_element", "bytes_per_right_element", "bytes_per_result_element", "rounds")


def _checked(name: str, stated: Any, *, place: str) -> Protocol:
    """The file may have been edited by hand: a price that is missing, no number or below 0 is named."""
    _check_keys(stated, ("about", "rounds_origin", "operations"), place)
    if not isinstance(stated["operations"], dict):
        raise ValueError(f"{place}.operations={stated['operations']!r} must hold a price by operation")
    for operation, price in stated["operations"].items():
        _check_keys(price, _PRICE_OF_PRODUCTS if operation in PRODUCTS else _PRICE_OF_ROWS, f"{place}.{operation}")
        for key, value in price.items():
            if key == "origin":
                continue
            whole = key.startswith("rounds")
            # A line through two lengths of a row may begin below 0.
            sound = _is_number(value) and (value >= 0 or key == "bytes_per_row")
            if not sound or (whole and not isinstance(value, int)):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{place}.{operation}.{key}={value!r} must be {kind}, 0 or more")
    return Protocol(name=name, **{key: stated[key] for key in ("about", "rounds_origin", "operations")})


def _check_keys(stated: Any, needed: Sequence[str], place: str) -> None:
    if not isinstance(stated, dict) or not set(needed) <= stated.keys():
        found = ", ".join(stated) if isinstance(stated, dict) else repr(stated)
        raise ValueError(f"{place} needs {', '.join(needed)}, and has {found}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def find_network(
    name: str,
    *,
    bandwidth_mbps: float | None = None,
    delay_ms: float | None = None,
    constants: Path | str = CONSTANTS_FILE,
) -> Network:
    """A network of the file, with its bandwidth or delay replaced. Raises ValueError with the nearest valid name."""
    known = load_constants(constants)["networks"]
    if name not in known:
        raise ValueError(f"unknown network {name!r}; {nearest(name, list(known))}")
    stated = known[name]
    _check_keys(stated, ("bandwidth_mbps", "delay_ms"), f"constants={constants}: networks.{name}")
    return Network(
        name=name,
        bandwidth_mbps=stated["bandwidth_mbps"] if bandwidth_mbps is None else bandwidth_mbps,
        delay_ms=stated["delay_ms"] if delay_ms is None else delay_ms,
    )
