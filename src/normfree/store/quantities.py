"""Every quantity that can be measured: its name, unit, axes and meaning.

Runs record these descriptions beside the values, and the report draws each quantity from its description.
docs/quantities.md is generated from this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Axis = Literal["layer", "head"]
Merge = Literal["mean", "root of the mean", "exponential of the mean", "sum", "maximum"]


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
    merges: Merge = "mean"
    """How values of batches and processes are combined. Means are kept as sums and counts until the end."""
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


_HEAD: tuple[Axis, ...] = ("layer", "head")
_DECLARED = (
    Quantity(
        name="entropy_nats", title="Entropy", unit="nats", axes=_HEAD, ceiling="ceiling_nats",
        mark=(0.75, "near uniform"), drawn="open",
        meaning="Mean entropy of a head's attention rows: 0 looks at one token, the ceiling at all tokens evenly.",
    ),
    Quantity(
        name="ceiling_nats", title="Entropy ceiling", unit="nats", axes=("layer",), drawn="no",
        meaning="Mean of ln(visible keys): the entropy of a head that attends evenly to all it may see.",
    ),
    Quantity(
        name="first_token_mass", title="Attention on the first token", axes=_HEAD, ceiling=1.0,
        meaning="Mean probability on the first token; near 1 the head is an attention sink.",
    ),
    Quantity(
        name="distance_tokens", title="Attended distance", unit="tokens", axes=_HEAD,
        meaning="Mean distance from a token back to where it attends.",
    ),
    Quantity(
        name="max_logit", title="Largest attention logit", axes=_HEAD, merges="maximum",
        meaning="Largest score that a head gives a key it may see, before softmax.",
    ),
    Quantity(
        name="rows", title="Attention rows", axes=_HEAD, merges="sum", drawn="no",
        meaning="Finite attention rows behind the means of a head.",
    ),
    Quantity(
        name="nonfinite_rows", title="Non-finite attention rows", axes=_HEAD, merges="sum", drawn="no",
        meaning="Attention rows with NaN or infinity; they are in no mean.",
    ),
    Quantity(
        name="residual_rms", title="RMS of the residual stream", axes=("layer",), merges="root of the mean",
        meaning="Root mean square of what enters each block, over tokens and features.",
    ),
    Quantity(
        name="negative_slope", title="Slope below zero", axes=("layer",), drawn="no",
        meaning="Learnable slope of a leaky ReLU: one for each layer that learns one, or one that all layers share.",
    ),
    Quantity(
        name="target_error_nats2", title="Squared distance from the target entropy", unit="nats squared",
        axes=("layer",),
        meaning="Mean over a layer's heads of (M - t)^2: M is a head's entropy in the last step, t its target.",
    ),
    Quantity(
        name="target_distance_nats", title="Largest distance from the target entropy", unit="nats", axes=("layer",),
        merges="maximum",
        meaning="Largest |M - t| of a layer's heads: M is a head's entropy in the last step, t its target.",
    ),
    Quantity(
        name="loss", title="Loss", unit="nats per token", drawn="no",
        meaning="Mean cross-entropy of the next token.",
    ),
    Quantity(
        name="perplexity", title="Perplexity", merges="exponential of the mean", drawn="no",
        meaning="Exponential of the mean cross-entropy of the next token.",
    ),
    Quantity(
        name="gradient_norm", title="Gradient norm",
        meaning="L2 norm of the gradient over all parameters, before clipping.",
    ),
    Quantity(
        name="learning_rate", title="Learning rate", drawn="no",
        meaning="Learning rate of the step.",
    ),
    Quantity(
        name="tokens_seen", title="Training tokens", unit="tokens", drawn="no", merges="sum",
        meaning="Tokens trained on so far.",
    ),
    Quantity(
        name="tokens_per_second", title="Training speed", unit="tokens per second", drawn="no",
        meaning="Speed of the training steps alone, without loading, measuring and saving.",
    ),
)  # fmt: skip

QUANTITIES = {quantity.name: quantity for quantity in _DECLARED}


def describe(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the descriptions of these quantities as plain values for run.json."""
    return {name: {k: v for k, v in asdict(QUANTITIES[name]).items() if k != "name"} for name in names}


def read_description(name: str, values: Mapping[str, Any]) -> Quantity:
    """Read back what `describe` wrote, ignoring unknown fields of newer versions."""
    known = {key: value for key, value in values.items() if key in Quantity.__dataclass_fields__}
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
    return Quantity(name=name, **options)
