"""Entropy from one call of a fused attention kernel, with no T x S matrix.

With s_j = scale q.k_j the kernel's log-sum-exp and an output made with V = K give
H = LSE(s) - scale q.(sum_j p_j k_j). Entropy does not change when every key moves by the same vector, so the mean key
is subtracted first, which keeps the two terms, and their rounding, small.
"""

# B batch, H query heads, G key heads, T query, S key, R rows of one block, D head width

import torch
from torch import Tensor

from normfree.entropy.request import AttentionEntropy, Request
from normfree.entropy.visibility import ROWS

ALIGNED = 4  # CUDA's kernel reads rows at multiples of this many float32 numbers (16 bytes)


def has_kernel(q: Tensor) -> bool:
    """True if a fused kernel that returns its log-sum-exp serves this device and dtype."""
    return q.device.type == "cpu" or (q.device.type == "cuda" and q.dtype == torch.float32)


def centre(k_BGSD: Tensor) -> Tensor:
    """Subtract the mean key of each head. A head with NaN or infinite keys stays as it is."""
    mean_BG1D = k_BGSD.mean(-2, keepdim=True)
    return k_BGSD - torch.where(mean_BG1D.isfinite(), mean_BG1D, 0.0)


def score_bound(request: Request) -> Tensor:
    """Upper bound on the centred scores of each (batch, head) pair (Cauchy-Schwarz); not finite if q or k is not."""
    q_BH = request.q.norm(dim=-1).amax(-1)
    k_BG = centre(request.k).norm(dim=-1).amax(-1)
    return abs(request.scale) * q_BH * k_BG.repeat_interleave(request.groups, dim=1)


def measure(request: Request) -> AttentionEntropy:
    """Measure every head. Results hold for heads whose `score_bound` is within the caller's limit."""
    visibility, width = request.visibility, request.q.shape[-1]
    k_BGSD = centre(request.k)
    q_BHTD, values_BGSE = request.q, k_BGSD
    if request.patterns:
        # q gets zeros where k gets features, so scores stay and E_p[feature] comes out beside E_p[k].
        # The features of a key are its position / S, and 1 for the first token.
        q_BHTD, values_BGSE = (torch.nn.functional.pad(value, (0, 2)) for value in (q_BHTD, k_BGSD))
        position_S = torch.arange(visibility.keys, device=k_BGSD.device)
        values_BGSE[..., width] = position_S / visibility.keys
        first_B = visibility.first_key()[:, 0].expand(len(k_BGSD))
        values_BGSE[..., width + 1] = (position_S == first_B[:, None])[:, None]
    output_BHTE, lse_BHT = _attend(q_BHTD, values_BGSE, request)
    counts_BHT = visibility.counts().expand(request.q.shape[:3]).contiguous()
    nats_BHT = lse_BHT - request.scale * (request.q * output_BHTE[..., :width]).sum(-1)
    results = {"nats": nats_BHT.clamp_min(0.0)}
    if request.patterns:
        own_T = torch.arange(visibility.keys - visibility.queries, visibility.keys, device=request.q.device)
        results["distance"] = own_T - output_BHTE[..., width] * visibility.keys
        results["first_mass"] = output_BHTE[..., width + 1]
    return AttentionEntropy.of_rows(counts_BHT, exact=False, **results)


def _attend(q_BHTE: Tensor, k_BGSE: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    visibility = request.visibility
    if visibility.causal_flag is not None:
        return kernel(q_BHTE, k_BGSE, scale=request.scale, causal=visibility.causal_flag)
    outputs, lses = [], []
    for block in visibility.blocks(ROWS):
        q_BHRE = q_BHTE[:, :, block.start : block.stop]
        k_BGCE = k_BGSE[:, :, block.first : block.last]
        additive = torch.zeros(block.visible.shape, dtype=q_BHTE.dtype, device=q_BHTE.device)
        additive.masked_fill_(~block.visible, -torch.inf)
        output, lse = kernel(q_BHRE, k_BGCE, scale=request.scale, additive_mask=additive)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def kernel(
    q_BHRE: Tensor, k_BGCE: Tensor, *, scale: float, causal: bool = False, additive_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention with V = K and its log-sum-exp, from private operators of torch that only this function calls.

    What it returns for a row that sees no key is not defined: callers put NaN there. The CPU kernel assumes that the
    numbers of a row are contiguous, so they are made so.
    """
    q_BHRE, k_BGCE = (value if value.stride(-1) == 1 else value.contiguous() for value in (q_BHRE, k_BGCE))
    if q_BHRE.device.type == "cpu":
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attend(q_BHRE, k_BGCE, k_BGCE, 0.0, causal, attn_mask=additive_mask, scale=scale)
    *shape, rows, width = q_BHRE.shape
    q_BHRE, k_BHCE = padded(q_BHRE), padded(k_BGCE.repeat_interleave(shape[1] // k_BGCE.shape[1], dim=1))
    bias = None
    if additive_mask is not None:  # padded in memory, then sliced to its own width
        bias = padded(additive_mask)[..., : additive_mask.shape[-1]].expand(*shape, -1, -1)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    output, lse, _, _ = attend(q_BHRE, k_BHCE, k_BHCE, bias, True, 0.0, causal, scale=scale)
    return output[..., :width], lse[..., :rows]


def padded(value: Tensor) -> Tensor:
    """Append zeros to each row until its length is a multiple of `ALIGNED`; scores do not change."""
    return torch.nn.functional.pad(value, (0, -value.shape[-1] % ALIGNED))
