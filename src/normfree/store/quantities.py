"""Every quantity that can be measured: its name, unit, axes and meaning. quantities.yaml declares them.

Runs record these descriptions beside the values, and the report draws each quantity from its description.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from normfree.spec.keys import build

Axis = Literal["layer", "head"]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number measured per head, per layer, or for the whole model."""

    name: str
    """Its key in metrics.jsonl, including the unit."""
    title: str
    """Its name in figures and tables, e.g. `Entropy`."""
    unit: str = ""
    axes: tuple[Axis, ...] = ()
    meaning: str
    """One sentence."""
    ceiling: float | str | None = None
    """The highest possible value: a number, or the name of another quantity. Colour scales end there."""
    mark: tuple[float, str] | None = None
    """A share of the ceiling to mark on the colour bar, and its label."""
    drawn: Literal["open", "folded", "no"] = "folded"
    """How the report shows it: open, folded, or not at all (bookkeeping)."""

    @property
    def label(self) -> str:
        """Title and unit, for axes and colour bars."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


_DECLARED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
QUANTITIES = {name: build(Quantity, {"name": name, **values}) for name, values in _DECLARED.items()}


def describe(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the descriptions of these quantities as plain values for run.json."""
    return {name: {k: v for k, v in asdict(QUANTITIES[name]).items() if k != "name"} for name in names}


def read_description(name: str, values: Mapping[str, Any]) -> Quantity:
    """Read back what `describe` wrote, ignoring unknown fields of newer versions."""
    known = {key: value for key, value in values.items() if key in Quantity.__dataclass_fields__}
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
    return Quantity(name=name, **options)
