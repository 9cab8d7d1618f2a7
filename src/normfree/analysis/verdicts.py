"""Verdicts of one run: entropic overload, entropy collapse, slopes that moved apart.

L layers, H heads, S slopes (L of them, or one that all layers share)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from normfree.analysis.entropy import Heads, shares_of_ceiling
from normfree.store.runs import Run

OVERLOAD_SHARE = 0.75
"""A head at or above this share of the causal ceiling is nearly uniform."""
COLLAPSE_NATS = 0.1
"""A head below this many nats looks at one token."""
SLOPE_SPREAD = 0.1
"""Per-layer slopes have moved apart when the highest is this far above the lowest."""

SLOPE_NEAR_ZERO = 0.05
"""A slope that began farther from 0 than this has gone to zero when it ends within it."""

DEFAULT_SLOPE = 0.01
"""What a leaky ReLU has when its run does not say: torch's default, and NormFreeConfig's."""


@dataclass(frozen=True)
class Overload:
    """Half or more of the heads in the first third of the layers at or above 3/4 of the causal ceiling."""

    holds: bool | None
    """None: non-finite heads could tip it either way."""
    early_layers: int
    share: float
    """Share of the early heads that are known to be that high."""
    first_step: int | None = None
    """First probe at which it held. Untrained heads are nearly uniform, so this is often step 0."""
    since_step: int | None = None
    """Start of the stretch of probes that lasts to the end, when it holds at the end."""


@dataclass(frozen=True)
class Collapse:
    """A head below 0.1 nats."""

    holds: bool | None
    """None: no finite head is that low, but some heads are not finite."""
    heads: tuple[tuple[int, int], ...]
    """(layer, head), both from 0."""
    lowest_nats: float
    first_step: int | None = None


@dataclass(frozen=True)
class Slopes:
    """Where learnable slopes began and ended."""

    first_S: tuple[float, ...]
    final_S: tuple[float, ...]
    final_step: int
    """The last probe: after training, or before a run stopped or diverged."""
    layers: tuple[int, int] | None
    """Layers of the lowest and of the highest slope; None for one slope that layers share."""
    diverging: bool
    """The spread is at least 0.1 at the end, or a slope is not finite."""
    first_step: int | None
    """First probe at which they were that far apart."""

    @property
    def gone_to_zero(self) -> bool:
        """Every slope ends within 0.05 of 0, or nearer to 0 than it began if it began there; NaN does not."""
        ends = zip(np.abs(self.first_S), np.abs(self.final_S), strict=True)
        return all(end <= SLOPE_NEAR_ZERO if start > SLOPE_NEAR_ZERO else end < start for start, end in ends)


def overload(heads: Heads, probes: Sequence[Heads] = ()) -> Overload:
    """The verdict at `heads`, with its history from `probes` (oldest first)."""
    early = math.ceil(len(heads.entropy_LH) / 3)
    share_LH = shares_of_ceiling(heads)[:early]
    high_LH = share_LH >= OVERLOAD_SHARE
    unknown = int((~np.isfinite(share_LH)).sum())
    high, half = int(high_LH.sum()), high_LH.size / 2
    holds = True if high >= half else None if high + unknown >= half else False
    held = [(probe.step, overload(probe).holds) for probe in probes]
    since = None
    for step, held_then in reversed(held if holds else []):
        if not held_then:
            break
        since = step
    return Overload(holds, early, high / high_LH.size, _first(held), since)


def collapse(heads: Heads, probes: Sequence[Heads] = ()) -> Collapse:
    """The verdict at `heads`, with its history from `probes` (oldest first)."""
    entropy_LH = heads.entropy_LH
    finite = entropy_LH[np.isfinite(entropy_LH)]
    low = tuple((int(layer), int(head)) for layer, head in np.argwhere(entropy_LH < COLLAPSE_NATS))
    holds = True if low else None if finite.size < entropy_LH.size else False
    held = [(probe.step, collapse(probe).holds) for probe in probes]
    return Collapse(holds, low, float(finite.min(initial=math.inf)), _first(held))


def slopes(run: Run) -> Slopes | None:
    """How far the learnable slopes of a run are apart, or None when it has none."""
    series = run.series("probe", "negative_slope")
    if not series:
        return None
    history = [(step, np.atleast_1d(np.array(value, dtype=float))) for step, value in series]
    final_step, final_S = history[-1]
    layer_S = slope_layers(run)
    return Slopes(
        first_S=tuple(history[0][1].tolist()),
        final_S=tuple(final_S.tolist()),
        final_step=final_step,
        layers=(layer_S[np.argmin(final_S)], layer_S[np.argmax(final_S)]) if layer_S else None,
        diverging=_apart(final_S),
        first_step=_first([(step, _apart(slope_S)) for step, slope_S in history]),
    )


def slope_layers(run: Run) -> tuple[int, ...]:
    """The layer of every learnable slope, in the order of the record; empty when layers share one or learn none."""
    recorded = run.facts["model"].get("slope_layers")
    if recorded is not None:
        return tuple(recorded)
    # A record from before these were kept.
    activation = run.spec["model"].get("activation")
    if isinstance(activation, list) and run.spec["model"].get("learnable_slope") == "per_layer":
        return tuple(layer for layer, name in enumerate(activation) if name == "leaky_relu")
    series = run.series("probe", "negative_slope")
    slopes_S = series[0][1] if series else []
    return tuple(range(len(slopes_S))) if len(slopes_S) > 1 else ()


def only_activation(run: Run) -> str | None:
    """The name of the activation that all layers have, or None where they differ."""
    named = run.spec["model"].get("activation")
    names = set(named) if isinstance(named, list) else {named}
    return names.pop() if len(names) == 1 else None


def fixed_slope(run: Run) -> float | None:
    """The slope below 0 of a run that does not learn it: 0 for ReLU, 1 for the identity; else None."""
    model = run.spec["model"]
    if model.get("learnable_slope", "none") != "none":
        return None
    leaky = model.get("negative_slope", DEFAULT_SLOPE)
    fixed: dict[str | None, float] = {"relu": 0.0, "identity": 1.0, "leaky_relu": leaky}
    return fixed.get(only_activation(run))


def _apart(slope_S: np.ndarray) -> bool:
    spread = float(np.ptp(slope_S))
    return not math.isfinite(spread) or spread >= SLOPE_SPREAD


def _first(held: Sequence[tuple[int, bool | None]]) -> int | None:
    return next((step for step, held_then in held if held_then), None)
