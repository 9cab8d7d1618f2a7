"""The entropy of attention heads as a differentiable part of training, in memory linear in T.

`normfree.entropy` measures any model; this file trains one of ours, and travels with a saved model.
"""

# N batch times heads, T tokens, D head dim; R rows of a block, C keys that they may see

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS = 256
"""Rows of the T x T matrix that exist at a time."""


def causal_head_entropies(query_BHTD: Tensor, key_BHTD: Tensor, scaling: float) -> Tensor:
    """(H,) mean entropy in nats of causal attention over rows and sequences; gradients reach queries and keys.

    Where a row is exactly uniform the gradient is 0: entropy is at its maximum there.
    """
    entropies_NT = _row_entropies(query_BHTD.flatten(0, 1), key_BHTD.flatten(0, 1), scaling)
    return entropies_NT.unflatten(0, query_BHTD.shape[:2]).mean((0, 2))


class _RowEntropies(torch.autograd.Function):
    """-sum_j p_j ln p_j of each row. Its derivative by a score is -p_j (ln p_j + entropy)."""

    @staticmethod
    def forward(ctx: Any, query_NTD: Tensor, key_NTD: Tensor, scaling: float) -> Tensor:
        entropies_NT = torch.cat(
            [-_weighted_logs(logs_NRC).sum(-1) for _, logs_NRC in _blocks(query_NTD, key_NTD, scaling)], dim=1
        )
        ctx.save_for_backward(query_NTD, key_NTD, entropies_NT)
        ctx.scaling = scaling
        return entropies_NT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("head entropies have first derivatives only")
        query_NTD, key_NTD, entropies_NT = ctx.saved_tensors
        (gradient_NT,) = gradients
        wide = entropies_NT.dtype
        query_gradient_NTD = torch.empty_like(query_NTD)
        key_gradient_NTD = torch.zeros_like(key_NTD, dtype=wide)
        with torch.autocast(query_NTD.device.type, enabled=False):
            for rows, logs_NRC in _blocks(query_NTD, key_NTD, ctx.scaling):
                keys = slice(logs_NRC.shape[-1])
                score_gradients_NRC = _weighted_logs(logs_NRC) + logs_NRC.exp() * entropies_NT[:, rows, None]
                score_gradients_NRC *= -ctx.scaling * gradient_NT[:, rows, None]
                query_gradient_NTD[:, rows] = (score_gradients_NRC @ key_NTD[:, keys].to(wide)).to(query_NTD.dtype)
                key_gradient_NTD[:, keys] += score_gradients_NRC.mT @ query_NTD[:, rows].to(wide)
        return query_gradient_NTD, key_gradient_NTD.to(key_NTD.dtype), None


_row_entropies: Any = torch.compiler.disable(_RowEntropies.apply)


def _blocks(query_NTD: Tensor, key_NTD: Tensor, scaling: float) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and the logarithms of their probabilities (N, R, C): -inf for keys that a row may not see."""
    tokens = query_NTD.shape[1]
    wide = torch.promote_types(query_NTD.dtype, torch.float32)
    with torch.autocast(query_NTD.device.type, enabled=False):
        for start in range(0, tokens, ROWS):
            rows = slice(start, min(start + ROWS, tokens))
            scores_NRC = query_NTD[:, rows].to(wide) @ (key_NTD[:, : rows.stop].to(wide).mT * scaling)
            future_RC = torch.ones(scores_NRC.shape[1:], dtype=torch.bool, device=scores_NRC.device).triu(start + 1)
            yield rows, scores_NRC.masked_fill_(future_RC, -torch.inf).log_softmax(-1)


def _weighted_logs(logs_NRC: Tensor) -> Tensor:
    """p ln p of each key, 0 for hidden keys."""
    return (logs_NRC.exp() * logs_NRC).masked_fill_(logs_NRC == -torch.inf, 0.0)
