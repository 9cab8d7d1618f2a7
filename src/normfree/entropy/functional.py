"""attention_entropy(): one door to the entropy of attention rows; the input decides which path serves it."""

# B batch, H query heads, G key heads, T query, S key, D head width

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, library

from normfree.entropy import blocked, fused, reference
from normfree.entropy.request import Measured, Request
from normfree.entropy.visibility import Visibility

Method = Literal["auto", "reference", "blocked"]

SCORE_LIMIT = 32.0
"""Largest bound on a head's centred scores that the fused path may serve in float32.

At the limit its error stays below 3e-5 nats, on random heads of width 64 below 1e-5 (docs/entropy.md); heads beyond
it take the exact path.
"""
NARROWEST = 16
"""Narrower heads take the exact path in float32: their scores come closer to the bound, and errors grow to 5e-5."""
NOTHING = (0,)


@dataclass(frozen=True)
class AttentionEntropy:
    """Entropy of every attention row, in nats, and which path served each head."""

    nats: Tensor
    """(B, H, T) float32, or float64 for float64 inputs. NaN where the row sees no key or is not finite."""
    visible: Tensor
    """(B, H, T) int32: keys the row may see; ln of it is the row's ceiling."""
    exact: Tensor
    """(B, H) bool: True where the exact path served, False where the fused one did."""
    distance: Tensor | None = None
    """(B, H, T) mean distance in tokens from the query to where it attends (with patterns=True)."""
    first_mass: Tensor | None = None
    """(B, H, T) probability on the first real token, the attention sink (with patterns=True)."""

    @property
    def counted(self) -> Tensor:
        """(B, H, T) bool: rows that see a key and came out finite; only these belong in a mean."""
        return (self.visible > 0) & self.nats.isfinite()

    @property
    def path(self) -> str:
        """Which path served: 'fused', 'exact' or 'fused+exact' (some heads each)."""
        exact_heads = int(self.exact.sum())
        return "fused" if exact_heads == 0 else "exact" if exact_heads == self.exact.numel() else "fused+exact"


def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    patterns: bool = False,
    differentiable: bool = False,
    method: Method = "auto",
) -> AttentionEntropy:
    """Shannon entropy -sum_j p_j ln p_j of p = softmax(scale q.k + ...), for every row, in nats.

    q is (B, H, T, D) and k is (B, G, S, D) with H a multiple of G (grouped-query attention). Values play
    no part. bfloat16 and float16 are raised to float32 first. `scale` defaults to D ** -0.5.

    causal: query t stands at key S - T + t and sees no later key (bottom right, so a KV cache is right).
    mask: bool (True is visible) or additive float, broadcastable to (B, H, T, S), or (B, S) for padding (bool, or 0 and
        1). An additive value hides a key at or below half of its dtype's minimum (-inf too); -1e9 in float32 does not.
    window: a query sees itself and the window - 1 keys before it; needs causal=True.
    softcap: scores become softcap * tanh(scores / softcap).
    sinks: (H,) or (B, H, T, 1) extra logits whose mass is dropped: the keys' p then sum below 1.
    patterns: also find `distance` and `first_mass`.
    differentiable: let gradients reach q and k (values are the same); for plain dot-product scores.
    method: 'auto' chooses between the fused and the exact path, 'blocked' takes the exact path for all
        heads, 'reference' writes the definition out (T x S memory, differentiable by itself).

    Raises ValueError for shapes, dtypes and combinations that do not fit.
    """
    _check(q, k, causal, mask, window, softcap, sinks)
    if method not in ("auto", "reference", "blocked"):
        raise ValueError(f"method={method!r}; allowed: 'auto', 'reference', 'blocked'")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if mask is not None:
        mask = _as_4d(mask, q, k)
    if sinks is not None and sinks.dim() == 1:
        sinks = sinks.view(1, -1, 1, 1)
    if method == "reference":
        request = _request(q, k, mask, sinks, factor, causal, window, softcap, patterns)
        with torch.autocast(q.device.type, enabled=False):
            found = reference.measure(request)
        return _result(*_fields(found, patterns))
    detached_mask = None if mask is None else mask.detach()
    detached_sinks = None if sinks is None else sinks.detach()
    result = _result(
        *torch.ops.normfree.attention_entropy(
            q.detach(), k.detach(), detached_mask, detached_sinks, factor, causal, window, softcap,
            patterns, method,
        )
    )  # fmt: skip
    if not differentiable:
        return result
    if softcap is not None or sinks is not None or (mask is not None and mask.dtype != torch.bool):
        raise ValueError(
            "differentiable=True serves plain dot-product scores with a bool mask, not softcap, sinks or an "
            "additive mask; pass method='reference' there (T x S memory)"
        )
    nats = _with_gradient(result.nats, q, k, mask, factor, causal, window)
    return replace(result, nats=nats)


# Unsafe in CUDA graphs: the host waits for numbers to choose a path.
@library.custom_op("normfree::attention_entropy", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attention_entropy(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    patterns: bool,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # One operator, so that torch.compile keeps it whole: the choice of paths depends on the numbers.
    request = _request(q, k, mask, sinks, scale, causal, window, softcap, patterns)
    with torch.autocast(q.device.type, enabled=False):
        found = measure(request, only_exact=method == "blocked")
    return _fields(found, patterns)


@_attention_entropy.register_fake
def _(q, k, mask, sinks, scale, causal, window, softcap, patterns, method):
    rows = q.shape[:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    pattern_shape = rows if patterns else NOTHING
    return (
        q.new_empty(rows, dtype=dtype),
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty(rows[:2], dtype=torch.bool),
        q.new_empty(pattern_shape, dtype=dtype),
        q.new_empty(pattern_shape, dtype=dtype),
    )


def measure(request: Request, *, only_exact: bool = False) -> Measured:
    """Choose the path: fused where scores are a plain dot product of ordinary size, exact elsewhere."""
    plain = request.softcap is None and request.sinks is None and request.scale > 0  # kernels mask before they scale
    narrow = request.q.dtype == torch.float32 and request.q.shape[-1] < NARROWEST
    if only_exact or narrow or not plain or not fused.has_kernel(request.q):
        return _exact(request)
    if request.visibility.adds_bias():
        return _exact(request)
    bound_BH = fused.score_bound(request)
    # float64 stays float64 in the fused path, where rounding is no concern; broken heads always leave it.
    limit = SCORE_LIMIT if request.q.dtype == torch.float32 else torch.finfo(torch.float64).max
    beyond = (~(bound_BH <= limit)).nonzero()
    if len(beyond) == bound_BH.numel():
        return _exact(request)
    found = fused.measure(request)
    if len(beyond) == 0:
        return found
    return _replace(found, blocked.measure(request, beyond), beyond)


def _exact(request: Request) -> Measured:
    shape = request.q.shape[:2]
    pairs = torch.ones(shape, dtype=torch.bool, device=request.q.device).nonzero()
    found = blocked.measure(request, pairs)
    unfold = {name: value.unflatten(0, shape) for name, value in vars(found).items() if value is not None}
    return Measured(**unfold)


def _replace(found: Measured, better: Measured, pairs: Tensor) -> Measured:
    batch_N, head_N = pairs.unbind(-1)
    joined = {}
    for name in ("nats", "exact", "distance", "first_mass"):
        value, improved = getattr(found, name), getattr(better, name)
        joined[name] = None if value is None else value.index_put((batch_N, head_N), improved)
    return Measured(visible=found.visible, **joined)


def _with_gradient(
    nats: Tensor, q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool, window: int | None
) -> Tensor:
    """The given values with the exact gradient dH/ds_j = -p_j (s_j - E_p[s]), from one ordinary SDPA call.

    g = -scale q.detach() . SDPA(q, k, k.detach()) has that gradient in q and k; its value is taken off again.
    """
    visibility = Visibility(q.shape[2], k.shape[2], causal, window, mask, q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        # A broken number spoils rows that are not counted; in others it would arrive as 0 times NaN.
        q, k = (torch.where(value.isfinite(), value, 0.0).to(wide) for value in (q, k))
        k = k - k.detach().mean(-2, keepdim=True)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # CUDA's float32 kernel serves no grouped queries
        plain = visibility.is_full or visibility.is_plain_causal
        output = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            k.detach(),
            attn_mask=None if plain else _with_a_key(visibility.whole()[0]),
            is_causal=visibility.is_plain_causal,
            scale=scale,
        )
        slope = -scale * (q.detach() * output).sum(-1)
    counted = nats.isfinite()
    slope = torch.where(counted, slope, slope.detach())
    # Adding 0 keeps the gradient and the value; where() keeps NaN rows NaN without a NaN gradient.
    return nats + torch.where(counted & slope.isfinite(), slope - slope.detach(), 0.0)


def _with_a_key(visible: Tensor) -> Tensor:
    """A row that sees nothing sees all: it is not counted, and no kernel divides by an empty sum."""
    return visible | ~visible.any(-1, keepdim=True)


def _request(q, k, mask, sinks, scale, causal, window, softcap, patterns) -> Request:
    wide = torch.promote_types(q.dtype, torch.float32)
    visibility = Visibility(q.shape[2], k.shape[2], causal, window, mask, q.device)
    return Request(q.to(wide), k.to(wide), scale, visibility, softcap, sinks, patterns)


def _fields(found: Measured, patterns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def asked(value: Tensor | None) -> Tensor:
        return value if patterns and value is not None else found.nats.new_empty(NOTHING)

    return found.nats, found.visible.to(torch.int32), found.exact, asked(found.distance), asked(found.first_mass)


def _result(nats: Tensor, visible: Tensor, exact: Tensor, *optional: Tensor) -> AttentionEntropy:
    return AttentionEntropy(nats, visible, exact, *(None if value.dim() == 1 else value for value in optional))


def request_of(q: Tensor, scores: dict[str, Any]) -> Request:
    """The attention call behind `scores_asked`, without gradients."""
    k, mask = scores["k"].detach(), scores["mask"]
    mask = None if mask is None else _as_4d(mask.detach(), q, k)
    how = (scores["scale"], scores["causal"], scores["window"], scores["softcap"])
    return _request(q.detach(), k, mask, scores["sinks"], *how, patterns=False)


def _as_4d(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if mask.dim() == 2 and mask.shape == (q.shape[0], k.shape[2]):
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                "a (B, S) mask says 1 (or True) for real tokens and 0 for padding; this one has other values"
            )
        return mask.bool()[:, None, None, :]
    wanted = (*q.shape[:3], k.shape[2])
    if not _broadcasts(mask, wanted):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; give one that broadcasts to (B, H, T, S) = {wanted}, or "
            f"(B, S) = {(wanted[0], wanted[3])} for padding"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask has dtype {mask.dtype}; give bool (True is visible) or an additive float mask")
    return mask


def _check(
    q: Tensor,
    k: Tensor,
    causal: bool,
    mask: Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k are (batch, heads, tokens, width), got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)}: batch and width must agree and the query heads be a "
            f"multiple of the key heads"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)}: no dimension may be empty")
    if not q.is_floating_point() or q.dtype != k.dtype:
        raise ValueError(f"q is {q.dtype} and k is {k.dtype}; give both in one floating dtype")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window={window} with causal={causal}: a window is at least 1 and needs causal=True")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be above 0")
    if sinks is not None and sinks.shape != q.shape[1:2] and not _broadcasts(sinks, (*q.shape[:3], 1)):
        raise ValueError(
            f"sinks have shape {tuple(sinks.shape)}; give one logit a head, ({q.shape[1]},), or a shape that "
            f"broadcasts to (B, H, T, 1)"
        )


def _broadcasts(value: Tensor, wanted: tuple[int, ...]) -> bool:
    return value.dim() == len(wanted) and all(have in (1, want) for have, want in zip(value.shape, wanted, strict=True))
