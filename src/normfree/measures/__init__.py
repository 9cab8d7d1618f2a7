"""Measures: context managers that read a model's forward passes and give quantities, in training and out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from normfree.measures.heads import Heads
from normfree.measures.logits import Logits
from normfree.measures.measure import Measure
from normfree.measures.perplexity import Perplexity
from normfree.measures.residual import Residual
from normfree.measures.slopes import Slopes
from normfree.store.quantities import QUANTITIES

MEASURES: dict[str, type[Measure]] = {
    "heads": Heads,
    "slopes": Slopes,
    "perplexity": Perplexity,
    "logits": Logits,
    "residual": Residual,
}


def periods_of(entries: Sequence[str], default: int) -> dict[str, int]:
    """`["heads", "spectrum:2500"]` as steps between measurements, by name; an entry without a number has `default`.

    Raises ValueError for an unknown measure, a number that is no period, a measure that stands twice, two measures
    that give one quantity, and a quantity without a description.
    """
    periods: dict[str, int] = {}
    for entry in entries:
        name, colon, steps = entry.partition(":")
        if name not in MEASURES:
            raise ValueError(f"probe.measures: unknown measure {name!r}; allowed: {', '.join(MEASURES)}")
        if colon and not (steps.isdigit() and int(steps)):
            raise ValueError(f"probe.measures: {entry!r}; give NAME or NAME:STEPS, e.g. {name}:500")
        if name in periods:
            raise ValueError(f"probe.measures: {name} stands twice; give it once")
        periods[name] = int(steps) if colon else default
    given_by: dict[str, str] = {}
    for name in periods:
        for quantity in MEASURES[name].gives:
            if quantity not in QUANTITIES:
                raise ValueError(
                    f"the measure {name} gives {quantity!r}, which has no description: add a Quantity to "
                    "normfree.store.quantities.QUANTITIES"
                )
            if (other := given_by.setdefault(quantity, name)) != name:
                raise ValueError(f"the measures {other} and {name} both give {quantity!r}; choose one of them")
    return periods


def open_measures(names: Sequence[str], model: nn.Module, **options: Mapping[str, Any]) -> list[Measure]:
    """Each measure, built for the model. `options` are keyword arguments by the measure's name.

    Raises ValueError, with the measure's name, for a model that it cannot serve.
    """
    opened = []
    for name in sorted(names, key=lambda name: name != "heads"):  # its entry in the registry outlives it: the lowest
        try:
            opened.append(MEASURES[name](model, **options.get(name, {})))
        except ValueError as error:
            raise type(error)(f"measure {name}: {error}") from error
    return opened
