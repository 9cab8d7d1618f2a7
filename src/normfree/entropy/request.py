"""The input and the result of the three paths that compute attention entropy."""

# B batch, H query heads, G key heads, T query, S key, D head width

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normfree.entropy.visibility import Visibility


@dataclass(frozen=True)
class Request:
    """One checked attention call: q (B, H, T, D) and k (B, G, S, D) in float32 or float64."""

    q: Tensor
    k: Tensor
    scale: float
    visibility: Visibility
    softcap: float | None = None
    sinks: Tensor | None = None
    """Extra logits, broadcastable to (B, H, T, 1)."""
    patterns: bool = False
    """Also compute the mean attended distance and the mass on the first token."""

    @property
    def groups(self) -> int:
        """Query heads that share one key head."""
        return self.q.shape[1] // self.k.shape[1]


@dataclass(frozen=True)
class AttentionEntropy:
    """Entropy of every attention row, in nats, and the path that computed each head."""

    nats: Tensor
    """(B, H, T) float32, or float64 for float64 inputs. NaN where the row sees no key or is not finite."""
    visible: Tensor
    """(B, H, T) int32: how many keys the row may see. Its logarithm is the ceiling of the row."""
    exact: Tensor
    """(B, H) bool: True for the exact path, False for the fused one."""
    distance: Tensor | None = None
    """(B, H, T) mean distance in tokens from the query to where it attends (with patterns=True)."""
    first_mass: Tensor | None = None
    """(B, H, T) probability on the first real token, the attention sink (with patterns=True)."""

    @property
    def counted(self) -> Tensor:
        """(B, H, T) bool: rows that belong in a mean, because they see a key and are finite."""
        return (self.visible > 0) & self.nats.isfinite()

    @property
    def path(self) -> str:
        """'fused', 'exact' or 'fused+exact' (some heads each)."""
        exact_heads = int(self.exact.sum())
        return "fused" if exact_heads == 0 else "exact" if exact_heads == self.exact.numel() else "fused+exact"
