"""Attention functions for transformers' AttentionInterface, and the NaN that torch's fused one loses."""

# B batch, H heads, T query (new tokens), S key (cached and new), D head dim, N batch times heads

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def eager_attention_forward(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Explicit attention for `attn_implementation="eager"`: returns (B, T, H, D) and the weights (B, H, T, S)."""
    scores_BHTS = query_BHTD @ key_BHSD.mT * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores_BHTS = scores_BHTS.masked_fill(~attention_mask, torch.finfo(scores_BHTS.dtype).min)
    elif attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    exact = torch.promote_types(scores_BHTS.dtype, torch.float32)
    weights_BHTS = F.softmax(scores_BHTS, dim=-1, dtype=exact).to(value_BHSD.dtype)
    weights_BHTS = F.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ value_BHSD).transpose(1, 2), weights_BHTS


LONGEST_WRITTEN_OUT = 512
"""Up to so many tokens, training in bf16 on the CPU is faster with explicit attention (docs/performance.md)."""


def written_out_causal_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Explicit causal attention of full blocks, (B, T, H, D), in the inputs' dtype; the softmax sums in float32.

    For training in bf16 on the CPU, where the backward pass of fused attention is slow.
    """
    batch, heads, tokens, _ = query_BHTD.shape
    future_TT = torch.full((tokens, tokens), -torch.inf, dtype=query_BHTD.dtype).triu(1)
    with torch.autocast("cpu", enabled=False):
        scores_NTT = torch.baddbmm(future_TT, query_BHTD.flatten(0, 1), key_BHTD.flatten(0, 1).mT, alpha=scaling)
        weights_NTT = F.dropout(F.softmax(scores_NTT, dim=-1), p=dropout, training=module.training)
        return (weights_NTT @ value_BHTD.flatten(0, 1)).unflatten(0, (batch, heads)).transpose(1, 2), None


def trains_faster_written_out(query_BHTD: Tensor, attention_mask: Tensor | None) -> bool:
    """True for short, full causal blocks in bf16 on the CPU that need gradients."""
    return (
        attention_mask is None
        and query_BHTD.requires_grad
        and query_BHTD.device.type == "cpu"
        and query_BHTD.dtype == torch.bfloat16
        and query_BHTD.shape[2] <= LONGEST_WRITTEN_OUT
    )


@torch.no_grad()
def nan_where_all_scores_are(query_BHTD: Tensor, key_BHSD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T, 1): NaN if a query of any head or its first visible key is not finite, else 0.

    On CPUs with AVX512, torch's fused attention returns 0 for a row whose scores are all NaN (seen in 2.13), which
    would hide a broken weight. With a mask the first visible key is not known here, so only queries count.
    """
    sums_BHT = query_BHTD.sum(-1, dtype=torch.float32)
    if attention_mask is None:
        sums_BHT = sums_BHT + key_BHSD[:, :, :1].sum(-1, dtype=torch.float32)
    return (sums_BHT * 0).sum(1)[..., None].to(query_BHTD.dtype)
