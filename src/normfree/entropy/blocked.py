"""The exact path: softmax statistics of a few rows at a time, memory O(rows x S), any kind of score.

Scores are formed in float64 where the device has it. From the distance to the row's maximum on, float32 is enough: with
d_j = m - s_j, l = sum e^-d_j and A = sum d_j e^-d_j, every term is non-negative and H = ln l + A / l is at least 0.
"""

# B batch, H query heads, N chosen (batch, head) pairs, T query, S key, D head width,
# R rows and C columns of one block

import torch
from torch import Tensor

from normfree.entropy.request import AttentionEntropy, Request
from normfree.entropy.visibility import Block

# Scores held at once. Blocks of this size stay near the cache: 2^20 is 8 MB in float64.
SCORES_AT_ONCE = 2**20

# e^-80 = 2e-35 adds nothing to a sum of at least 1, and is not a denormal: those took twice the time.
LARGEST_GAP = 80.0


def measure(request: Request, pairs: Tensor) -> AttentionEntropy:
    """Measure the (batch, head) `pairs`, int64 (N, 2); the fields of the result have shape (N, T)."""
    rows = max(16, min(256, 2**17 // request.visibility.keys))
    first_key = request.visibility.first_key() if request.patterns else None
    blocks: list[dict[str, Tensor]] = []
    for block in request.visibility.blocks(rows):
        area = max(1, (block.stop - block.start) * (block.last - block.first))
        parts = [
            _measure_block(request, block, part.unbind(-1), first_key)
            for part in pairs.split(max(1, SCORES_AT_ONCE // area))
        ]
        blocks.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return AttentionEntropy.of_rows(
        exact=True, **{name: torch.cat([block[name] for block in blocks], dim=-1) for name in blocks[0]}
    )


def _measure_block(
    request: Request, block: Block, pairs: tuple[Tensor, ...], first_key: Tensor | None
) -> dict[str, Tensor]:
    def of_pairs(value: Tensor) -> Tensor:
        """The slices of these pairs from a tensor whose first two dimensions broadcast to (B, H)."""
        return value.expand(*request.q.shape[:2], *value.shape[2:])[pairs]

    visible_NRC = of_pairs(block.visible)
    counts_NR = visible_NRC.sum(-1, dtype=torch.int32)
    wide = torch.float32 if request.q.device.type == "mps" else torch.float64
    q_NRD = of_pairs(request.q[:, :, block.start : block.stop]).to(wide)
    k_NCD = request.k[pairs[0], pairs[1] // request.groups, block.first : block.last].to(wide)
    scores_NRC = (q_NRD @ k_NCD.mT).mul_(request.scale)
    if request.softcap is not None:
        scores_NRC = scores_NRC.div_(request.softcap).tanh_().mul_(request.softcap)
    if block.bias is not None:
        scores_NRC += of_pairs(block.bias)
    scores_NRC.masked_fill_(~visible_NRC, -torch.inf)
    if request.sinks is None:
        sinks_NR1 = scores_NRC.new_full((1, 1, 1), -torch.inf)  # adds exp(-inf) = 0 to every sum
    else:
        sinks_BHT1 = request.sinks.expand(-1, -1, request.q.shape[2], -1)
        sinks_NR1 = of_pairs(sinks_BHT1[:, :, block.start : block.stop]).to(scores_NRC.dtype)
    shift_NR1 = torch.maximum(scores_NRC.amax(-1, keepdim=True), sinks_NR1)
    gap_NRC = (shift_NR1 - scores_NRC).to(request.q.dtype).clamp_(max=LARGEST_GAP)
    mass_NRC = torch.exp(-gap_NRC).masked_fill_(~visible_NRC, 0.0)
    keys_NR = mass_NRC.sum(-1)
    total_NR = keys_NR + torch.exp(sinks_NR1 - shift_NR1).squeeze(-1).to(keys_NR.dtype)
    nats_NR = total_NR.log() * (keys_NR / total_NR) + (mass_NRC * gap_NRC).sum(-1) / total_NR
    results = {"visible": counts_NR, "nats": nats_NR.clamp_min(0.0)}
    if first_key is not None:
        p_NRC = mass_NRC / total_NR[..., None]
        offset = request.visibility.keys - request.visibility.queries
        own_R = torch.arange(block.start + offset, block.stop + offset, device=p_NRC.device, dtype=p_NRC.dtype)
        position_C = torch.arange(block.first, block.last, device=p_NRC.device)
        on_first_NC = (position_C == of_pairs(first_key)[:, None]).to(p_NRC.dtype)
        results["distance"] = own_R * p_NRC.sum(-1) - p_NRC @ position_C.to(p_NRC.dtype)
        results["first_mass"] = (p_NRC * on_first_NC[:, None]).sum(-1)
    return results
