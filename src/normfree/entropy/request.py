"""The input and the result of the three paths that compute attention entropy."""

# B batch, H query heads, G key heads, T query, S key, D head width, R rows and C columns of one block

from __future__ import annotations

from dataclasses import dataclass

import torch
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
    sinks: Tensor | None = None  # extra logits, broadcastable to (B, H, T, 1)
    patterns: bool = False  # also compute the mean attended distance and the mass on the first token

    @property
    def groups(self) -> int:
        """Query heads that share one key head."""
        return self.q.shape[1] // self.k.shape[1]


@dataclass(frozen=True)
class AttentionEntropy:
    """Entropy of every attention row, in nats, and the path that computed each head."""

    nats: Tensor  # (B, H, T) float32, or float64 for float64 inputs; NaN where the row sees no key or is not finite
    visible: Tensor  # (B, H, T) int32: how many keys the row may see; its logarithm is the ceiling of the row
    exact: Tensor  # (B, H) bool: True for the exact path, False for the fused one
    distance: Tensor | None = None  # (B, H, T) mean distance in tokens from the query to where it attends
    first_mass: Tensor | None = None  # (B, H, T) probability on the first real token, the attention sink

    @classmethod
    def of_rows(cls, visible: Tensor, *, exact: bool, **values: Tensor) -> AttentionEntropy:
        """The values of rows that see a key, all by one path; NaN for the others."""
        exact_heads = torch.full(visible.shape[:-1], exact, device=visible.device)
        masked = {name: value.masked_fill(visible == 0, torch.nan) for name, value in values.items()}
        return cls(visible=visible, exact=exact_heads, **masked)

    @property
    def counted(self) -> Tensor:
        """(B, H, T) bool: rows that belong in a mean, because they see a key and are finite."""
        return (self.visible > 0) & self.nats.isfinite()


def as_request(q, k, mask, sinks, scale, causal, window, softcap, patterns) -> Request:
    """Check the arguments of `attention_entropy`, or raise ValueError, and raise q and k to at least float32."""
    shapes = f"q {tuple(q.shape)} and k {tuple(k.shape)}"
    if q.dim() != 4 or k.dim() != 4 or 0 in q.shape or 0 in k.shape:
        raise ValueError(f"{shapes}: give (batch, heads, tokens, width), none of them empty")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: give equal batch and width, and a multiple of the key heads as query heads")
    if not q.is_floating_point() or q.dtype != k.dtype:
        raise ValueError(f"q is {q.dtype} and k is {k.dtype}; give both in one floating dtype")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window={window} with causal={causal}: a window is at least 1 and needs causal=True")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be above 0")
    if sinks is not None:
        if sinks.shape != q.shape[1:2] and not _broadcasts(sinks, (*q.shape[:3], 1)):
            raise ValueError(f"sinks have shape {tuple(sinks.shape)}; give (H,), or what broadcasts to (B, H, T, 1)")
        sinks = sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    visibility = Visibility(q.shape[2], k.shape[2], causal, window, _mask_in_4d(mask, q, k), q.device)
    return Request(q.to(wide), k.to(wide), scale, visibility, softcap, sinks, patterns)


def _mask_in_4d(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape == (q.shape[0], k.shape[2]):
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("a (B, S) mask has other values than 1 (or True) for real tokens and 0 for padding")
        return mask.bool()[:, None, None, :]
    wanted = (*q.shape[:3], k.shape[2])
    if not _broadcasts(mask, wanted):
        raise ValueError(f"mask has shape {tuple(mask.shape)}; it must broadcast to {wanted}, or be (B, S)")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask has dtype {mask.dtype}; give bool (True is visible) or an additive float mask")
    return mask


def _broadcasts(value: Tensor, wanted: tuple[int, ...]) -> bool:
    return value.dim() == len(wanted) and all(have in (1, want) for have, want in zip(value.shape, wanted, strict=True))
