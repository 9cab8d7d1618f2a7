"""Attention entropy from its definition in float64, sharing no code with the library."""

# B batch, H query heads, G key heads, D head dim, T query, S key

import torch
from torch import Tensor


def random_heads(
    *, batch=2, query_heads=4, key_heads=2, queries=33, keys=None, width=16, size=1.0, seed=0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, query_heads, queries, width, generator=generator) * size
    return q, torch.randn(batch, key_heads, keys or queries, width, generator=generator)


def causal(queries: int, keys: int) -> Tensor:
    """(T, S) bool: the last query sees every key."""
    return torch.arange(keys)[None] <= torch.arange(queries)[:, None] + keys - queries


def truth(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> dict[str, Tensor]:
    """The fields of an AttentionEntropy; NaN where a row sees nothing."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    visible = visible.expand_as(scores)
    empty = ~visible.any(-1)
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(empty[..., None], 0.0)
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    p = logits.softmax(-1)[..., : k.shape[2]]
    log_p = p.where(p > 0, 1.0).log()
    position = torch.arange(k.shape[2], dtype=torch.float64)
    own = torch.arange(k.shape[2] - q.shape[2], k.shape[2])
    first = visible.any(-2).int().argmax(-1)[..., None, None].expand(*p.shape[:3], 1)
    results = {
        "nats": -(p * log_p).sum(-1),
        "distance": own * p.sum(-1) - p @ position,
        "first_mass": p.gather(-1, first)[..., 0],
    }
    return {name: value.masked_fill(empty, torch.nan) for name, value in results.items()}


def check(value: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    value = value.detach().cpu().double()
    assert torch.equal(value.isnan(), expected.isnan()), f"NaN in {int(value.isnan().sum())} rows"
    error = (value - expected).abs().nan_to_num()
    assert error.max() < tolerance, f"largest error {float(error.max()):.2e} at {error.argmax().item()}"
