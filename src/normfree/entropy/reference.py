"""The definition of attention entropy in the obvious lines: slow, T x S memory, differentiable."""

# B batch, H query heads, T query, S key, K keys and the sink

from __future__ import annotations

import torch

from normfree.entropy.request import AttentionEntropy, Request


def measure(request: Request) -> AttentionEntropy:
    """Compute -sum_j p_j ln p_j in the dtype of `request.q` (pass float64 for the truth)."""
    q_BHTD, visibility = request.q, request.visibility
    block = visibility.whole()
    scores_BHTS = request.scores(block)
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
