"""attention_entropy(): the entropy of attention rows, by the fastest path that is exact for the input."""

# B batch, H query heads, G key heads, T query, S key, K keys and the sink, D head width

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from normfree.entropy import blocked, fused
from normfree.entropy.request import AttentionEntropy, Request, as_request

# Largest bound on the centred scores of a head for the fused path in float32. At the limit its error stays below 3e-5
# nats, on random heads of width 64 below 1e-5 (docs/entropy.md).
SCORE_LIMIT = 32.0
# Narrower heads take the exact path in float32: their scores come closer to the bound, errors up to 5e-5.
NARROWEST = 16


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
    method: Literal["auto", "reference", "blocked"] = "auto",
) -> AttentionEntropy:
    """Shannon entropy -sum_j p_j ln p_j of p = softmax(scale q.k + ...), for every row, in nats.

    q is (B, H, T, D) and k is (B, G, S, D) with H a multiple of G (grouped-query attention). Values play no part.
    bfloat16 and float16 are raised to float32 first. `scale` defaults to D ** -0.5.

    causal: query t stands at key S - T + t and sees no later key (aligned at the bottom right, as with a KV cache).
    mask: bool (True is visible) or additive float, broadcastable to (B, H, T, S), or (B, S) for padding (bool, or 0 and
        1). An additive value hides a key at or below half of its dtype's minimum (-inf too); -1e9 in float32 does not.
    window: a query sees itself and the window - 1 keys before it; needs causal=True.
    softcap: scores become softcap * tanh(scores / softcap).
    sinks: (H,) or (B, H, T, 1) extra logits whose mass is dropped, so the p of the keys sum to less than 1.
    patterns: also compute `distance` and `first_mass`.
    differentiable: let gradients reach q and k (values are the same); for plain dot-product scores.
    method: 'auto' chooses the fused or the exact path for each head, 'blocked' takes the exact path for all,
        'reference' writes the definition out (T x S memory, differentiable).

    Raises ValueError for shapes, dtypes and combinations that do not fit.
    """
    if method not in ("auto", "reference", "blocked"):
        raise ValueError(f"method={method!r}; allowed: 'auto', 'reference', 'blocked'")
    request = as_request(q, k, mask, sinks, scale, causal, window, softcap, patterns)
    if method == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return _by_definition(request)
    mask = request.visibility.mask
    if differentiable and not (softcap is None and sinks is None and (mask is None or mask.dtype == torch.bool)):
        raise ValueError("differentiable=True with softcap, sinks or an additive mask needs method='reference'")
    with torch.no_grad():
        result = measure(request, only_exact=method == "blocked")
    return replace(result, nats=_with_gradient(result.nats, request)) if differentiable else result


@torch.compiler.disable(reason="the choice of paths depends on the numbers")
def measure(request: Request, *, only_exact: bool = False) -> AttentionEntropy:
    """Take the fused path where scores are a plain dot product of ordinary size, the exact one elsewhere."""
    with torch.autocast(request.q.device.type, enabled=False):
        # Kernels mask before they scale.
        plain = request.softcap is None and request.sinks is None and request.scale > 0
        narrow = request.q.dtype == torch.float32 and request.q.shape[-1] < NARROWEST
        unfit = only_exact or narrow or not plain or not fused.has_kernel(request.q)
        if unfit or request.visibility.adds_bias():
            beyond_BH = torch.ones(request.q.shape[:2], dtype=torch.bool, device=request.q.device)
        else:
            # Rounding is no concern in float64. Heads with NaN or infinity take the exact path in every dtype.
            limit = SCORE_LIMIT if request.q.dtype == torch.float32 else torch.finfo(torch.float64).max
            beyond_BH = ~(fused.score_bound(request) <= limit)
        pairs = beyond_BH.nonzero()
        if len(pairs) == 0:
            return fused.measure(request)
        fields = {name: rows for name, rows in vars(blocked.measure(request, pairs)).items() if rows is not None}
        if len(pairs) == beyond_BH.numel():
            return AttentionEntropy(**{name: rows.unflatten(0, beyond_BH.shape) for name, rows in fields.items()})
        result = fused.measure(request)
        for name, rows in fields.items():
            fields[name] = getattr(result, name).index_put(pairs.unbind(-1), rows)
        return AttentionEntropy(**fields)


def _by_definition(request: Request) -> AttentionEntropy:
    """Compute -sum_j p_j ln p_j in the obvious lines: slow, T x S memory, differentiable."""
    q_BHTD, visibility = request.q, request.visibility
    block = visibility.whole()
    scores_BHTS = q_BHTD @ request.k.repeat_interleave(request.groups, dim=1).mT * request.scale
    if request.softcap is not None:
        scores_BHTS = request.softcap * torch.tanh(scores_BHTS / request.softcap)
    if block.bias is not None:
        scores_BHTS = scores_BHTS + block.bias
    visible_BHTS = block.visible.expand_as(scores_BHTS)
    # A finite stand-in for -inf: rows without a key would otherwise poison the gradient of every row.
    scores_BHTS = scores_BHTS.masked_fill(~visible_BHTS, torch.finfo(scores_BHTS.dtype).min)
    logits_BHTK = scores_BHTS
    if request.sinks is not None:
        sinks_BHT1 = request.sinks.to(scores_BHTS.dtype).expand(*scores_BHTS.shape[:-1], 1)
        logits_BHTK = torch.cat([scores_BHTS, sinks_BHT1], dim=-1)
    log_p_BHTS = logits_BHTK.log_softmax(-1)[..., : visibility.keys].masked_fill(~visible_BHTS, 0.0)
    p_BHTS = log_p_BHTS.exp().masked_fill(~visible_BHTS, 0.0)

    results = {"nats": -(p_BHTS * log_p_BHTS).sum(-1)}
    if request.patterns:
        position_S = torch.arange(visibility.keys, device=q_BHTD.device, dtype=q_BHTD.dtype)
        own_T = torch.arange(visibility.keys - visibility.queries, visibility.keys, device=q_BHTD.device)
        first_BH = visibility.first_key().expand(q_BHTD.shape[:2]).clamp(max=visibility.keys - 1)
        first_BHT1 = first_BH[..., None, None].expand(*p_BHTS.shape[:-1], 1)
        results["distance"] = own_T * p_BHTS.sum(-1) - p_BHTS @ position_S
        results["first_mass"] = p_BHTS.gather(-1, first_BHT1).squeeze(-1)
    return AttentionEntropy.of_rows(visible_BHTS.sum(-1, dtype=torch.int32), exact=True, **results)


def _with_gradient(nats: Tensor, request: Request) -> Tensor:
    """The same values with the exact gradient dH/ds_j = -p_j (s_j - E_p[s]), from one ordinary SDPA call.

    g = -scale q.detach() . SDPA(q, k, k.detach()) has that gradient in q and k; its own value is subtracted.
    """
    visibility = request.visibility
    with torch.autocast(nats.device.type, enabled=False):
        # Rows that see NaN or infinity are not counted; in the others it would arrive as 0 times NaN.
        q, k = (torch.where(value.isfinite(), value, 0.0) for value in (request.q, request.k))
        k = k - k.detach().mean(-2, keepdim=True)
        k = k.repeat_interleave(request.groups, dim=1)  # CUDA's float32 kernel has no grouped queries
        visible, flag = None, visibility.causal_flag
        if flag is None:
            visible = visibility.whole().visible
            visible = visible | ~visible.any(-1, keepdim=True)  # no kernel divides by an empty sum; not counted anyway
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, k.detach(), attn_mask=visible, is_causal=bool(flag), scale=request.scale
        )
        slope = -request.scale * (q.detach() * output).sum(-1)
    counted = nats.isfinite()
    slope = torch.where(counted, slope, slope.detach())
    # Adding 0 keeps the gradient and the value; where() keeps NaN rows NaN without a NaN gradient.
    return nats + torch.where(counted & slope.isfinite(), slope - slope.detach(), 0.0)
