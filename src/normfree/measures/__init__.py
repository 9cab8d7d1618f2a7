"""Measures: context managers that read a model's forward passes and give quantities."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from normfree.measures.gradients import Gradients, Slopes
from normfree.measures.heads import Heads, Sinks
from normfree.measures.losses import Losses
from normfree.measures.measure import Measure
from normfree.measures.perplexity import Accuracy, Perplexity
from normfree.measures.ranges import Ranges
from normfree.measures.residual import Propagation, Residual
from normfree.measures.scores import Logits
from normfree.measures.spectrum import Spectrum
from normfree.measures.units import Selectivity, Units
from normfree.spec.keys import nearest
from normfree.store.quantities import QUANTITIES

logger = logging.getLogger("normfree")

MEASURES: dict[str, type[Measure]] = {
    "heads": Heads,
    "slopes": Slopes,
    "perplexity": Perplexity,
    "accuracy": Accuracy,
    "logits": Logits,
    "residual": Residual,
    "propagation": Propagation,
    "losses": Losses,
    "gradients": Gradients,
    "sinks": Sinks,
    "ranges": Ranges,
    "units": Units,
    "spectrum": Spectrum,
    "selectivity": Selectivity,
}


def periods_of(entries: Sequence[str], default: int) -> dict[str, int]:
    """`["heads", "logits:2500", "spectrum:x25"]` as steps between measurements: `default`, 2500, 25 * `default`.

    Raises ValueError for an unknown or repeated measure, a number that is no period, and undescribed quantities.
    """
    periods: dict[str, int] = {}
    for entry in entries:
        name, colon, steps = entry.partition(":")
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r}; {nearest(name, list(MEASURES))}")
        number = steps.removeprefix("x")
        if colon and not (number.isdigit() and int(number)):
            raise ValueError(f"probe.measures: {entry!r}; give NAME, NAME:STEPS or NAME:xTIMES, e.g. {name}:500")
        if name in periods:
            raise ValueError(f"probe.measures: {name} stands twice; give it once")
        periods[name] = int(number or 1) * (1 if steps.isdigit() else default)
        if unknown := [quantity for quantity in MEASURES[name].gives if quantity not in QUANTITIES]:
            raise ValueError(f"the measure {name} gives {unknown[0]!r}, which has no description in QUANTITIES")
    return periods


def open_measures(
    names: Sequence[str],
    model: nn.Module,
    tokenizer: Callable[[], Any] | None = None,
    *,
    skip_refused: bool = False,
    **options: Mapping[str, Any],
) -> list[Measure]:
    """Build measures for a model. `options` are keyword arguments by name; `tokenizer` loads the model's.

    Raises ValueError, with the measure's name, for a model that it cannot serve. With `skip_refused`, such measures are
    left out with a warning, unless none can serve it.
    """
    measures: list[Measure] = []
    refused: list[ValueError] = []
    for name in sorted(names, key=lambda name: name != "heads"):  # the first to enter the registry, the last to leave
        own = options.get(name) or {}
        try:
            if MEASURES[name].needs_tokenizer and tokenizer is not None and not own:
                own = {"tokenizer": tokenizer()}
            measures.append(MEASURES[name](model, **own))
        except ValueError as error:
            refused.append(type(error)(f"measure {name}: {error}"))
    if refused and not (skip_refused and measures):
        raise refused[0]
    for error in refused:
        logger.warning("left out: %s", error)
    return measures
