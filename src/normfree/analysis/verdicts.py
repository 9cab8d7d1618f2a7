"""Verdicts on one run: entropic overload, entropy collapse, slopes that moved apart.

L layers, H heads, S slopes (one per layer that learns one, or a single shared one)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from normfree.analysis.entropy import OVERLOAD_SHARE, Heads, shares_of_ceiling
from normfree.store.runs import Run

COLLAPSE_NATS = 0.1
"""A head below this many nats attends to a single token."""
SLOPE_SPREAD = 0.1
"""Per-layer slopes have moved apart if the highest is this far above the lowest."""
SLOPE_NEAR_ZERO = 0.05
"""A slope that began farther from 0 than this has gone to zero if it ends within it."""
DEFAULT_SLOPE = 0.01
"""Slope of a leaky ReLU whose run does not name one: the default of torch and of NormFreeConfig."""


@dataclass(frozen=True)
class Overload:
    """At least half of the heads in the first third of the layers are nearly uniform."""

    holds: bool | None
    """None: some heads are NaN and could change the verdict."""
    early_layers: int
    share: float
    """Share of the early heads that are known to be nearly uniform."""
    first_step: int | None = None
    """First probe at which it held. Untrained heads are nearly uniform, so this is often step 0."""
    since_step: int | None = None
    """Start of the stretch of probes that lasts to the end, if it holds at the end."""


@dataclass(frozen=True)
class Collapse:
    """A head has less than 0.1 nats."""

    holds: bool | None
    """None: no finite head is that low, but some heads are NaN."""
    heads: tuple[tuple[int, int], ...]
    """(layer, head), both from 0."""
    lowest_nats: float
    first_step: int | None = None


@dataclass(frozen=True)
class Slopes:
    """Learnable slopes at the first and the last probe."""

    first_S: tuple[float, ...]
    final_S: tuple[float, ...]
    final_step: int
    layers: tuple[int, int] | None
    """Layers of the lowest and of the highest slope; None if all layers share one slope."""
    diverging: bool
    """The spread is at least 0.1 at the end, or a slope is not finite."""
    first_step: int | None
    """First probe at which they were that far apart."""

    @property
    def gone_to_zero(self) -> bool:
        """Every slope ends within 0.05 of 0, or closer to 0 than it began if it began there; NaN does not."""
        ends = zip(np.abs(self.first_S), np.abs(self.final_S), strict=True)
        return all(end <= SLOPE_NEAR_ZERO if start > SLOPE_NEAR_ZERO else end < start for start, end in ends)


def overload(heads: Heads, probes: Sequence[Heads] = ()) -> Overload:
    """The verdict at `heads`, with its history from `probes` (oldest first)."""
    early = math.ceil(len(heads.entropy_LH) / 3)
    share_LH = shares_of_ceiling(heads)[:early]
    high, half = int((share_LH >= OVERLOAD_SHARE).sum()), share_LH.size / 2
    unknown = int((~np.isfinite(share_LH)).sum())
    holds = True if high >= half else None if high + unknown >= half else False
    history = [(probe.step, overload(probe).holds) for probe in probes]
    since = None
    for step, held in reversed(history if holds else []):
        if not held:
            break
        since = step
    return Overload(holds, early, high / share_LH.size, _first_step(history), since)


def collapse(heads: Heads, probes: Sequence[Heads] = ()) -> Collapse:
    """The verdict at `heads`, with its history from `probes` (oldest first)."""
    finite = heads.entropy_LH[np.isfinite(heads.entropy_LH)]
    low = tuple((int(layer), int(head)) for layer, head in np.argwhere(heads.entropy_LH < COLLAPSE_NATS))
    holds = True if low else None if finite.size < heads.entropy_LH.size else False
    history = [(probe.step, collapse(probe).holds) for probe in probes]
    return Collapse(holds, low, float(finite.min(initial=math.inf)), _first_step(history))


def slopes(run: Run) -> Slopes | None:
    """Spread between the learnable slopes of a run; None if it learns none."""
    history = [(step, np.array(value, dtype=float)) for step, value in run.series("probe", "negative_slope")]
    if not history:
        return None
    final_step, final_S = history[-1]
    layer_S = slope_layers(run)
    spreads = [(step, float(np.ptp(slope_S))) for step, slope_S in history]
    apart = [(step, not math.isfinite(spread) or spread >= SLOPE_SPREAD) for step, spread in spreads]
    return Slopes(
        first_S=tuple(history[0][1].tolist()),
        final_S=tuple(final_S.tolist()),
        final_step=final_step,
        layers=(layer_S[np.argmin(final_S)], layer_S[np.argmax(final_S)]) if layer_S else None,
        diverging=apart[-1][1],
        first_step=_first_step(apart),
    )


def slope_layers(run: Run) -> tuple[int, ...]:
    """The layer of every learnable slope, in the order of the record; empty if all layers share one or learn none."""
    facts = run.facts["model"]
    per_layer = run.spec["model"].get("learnable_slope") == "per_layer"
    return tuple(facts.get("slope_layers", range(facts["layers"]) if per_layer else ()))  # older records lack them


def only_activation(run: Run) -> str | None:
    """The activation that all layers have, or None if they differ."""
    activation = run.spec["model"].get("activation")
    names = set(activation) if isinstance(activation, list) else {activation}
    return names.pop() if len(names) == 1 else None


def fixed_slope(run: Run) -> float | None:
    """The slope below 0 of a run that does not learn it: 0 for ReLU, 1 for the identity; else None."""
    model = run.spec["model"]
    if model.get("learnable_slope", "none") != "none":
        return None
    leaky = model.get("negative_slope", DEFAULT_SLOPE)
    slope_of: dict[str | None, float] = {"relu": 0.0, "identity": 1.0, "leaky_relu": leaky}
    return slope_of.get(only_activation(run))


def _first_step(history: Sequence[tuple[int, bool | None]]) -> int | None:
    return next((step for step, held in history if held), None)
