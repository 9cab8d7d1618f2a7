"""What the three paths are asked and what they answer."""

# B batch, H query heads, G key heads, T query, S key, D head width

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normfree.entropy.visibility import Visibility


@dataclass(frozen=True)
class Request:
    """One attention call, checked: q (B, H, T, D) and k (B, G, S, D) in float32 or float64."""

    q: Tensor
    k: Tensor
    scale: float
    visibility: Visibility
    softcap: float | None = None
    sinks: Tensor | None = None
    """Extra logits, broadcastable to (B, H, T, 1)."""
    patterns: bool = False
    """Also measure mean attended distance and the mass on the first token."""

    @property
    def groups(self) -> int:
        """Query heads that share one key head."""
        return self.q.shape[1] // self.k.shape[1]


@dataclass(frozen=True)
class Measured:
    """What a path found. Rows that see no key are NaN and have `visible` 0."""

    nats: Tensor
    visible: Tensor
    exact: Tensor
    distance: Tensor | None = None
    first_mass: Tensor | None = None
