"""The entropy of attention heads as a differentiable part of training, in memory linear in T.

`normfree.entropy` measures any model; this file trains one of ours, and travels with a saved model.
"""

# N batch times heads, T tokens, D head dim; R rows of a block, C keys that they may see

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS = 256
"""Rows of the T x T matrix that exist at a time."""


def head_entropies(query_BHTD: Tensor, key_BHTD: Tensor, scaling: float, *, causal: bool) -> Tensor:
    """(H,) mean entropy in nats of full attention over rows and sequences; gradients reach queries and keys.

    Where a row is exactly uniform the gradient is 0: entropy is at its maximum there.
    """
    entropies_NT = _row_entropies(query_BHTD.flatten(0, 1), key_BHTD.flatten(0, 1), scaling, causal)
    return entropies_NT.unflatten(0, query_BHTD.shape[:2]).mean((0, 2))


def entropies_of_weights(weights_NTS: Tensor, batch: int) -> Tensor:
    """(H,) the same from attention weights that exist anyway; in bf16 they give it within about 0.003 nats.

    A hidden key has weight 0, where the derivative of p ln p has no bound; clamped, softmax makes it 0.
    """
    logs_NTS = weights_NTS.clamp(min=1e-9).log()
    entropies_NT = -(weights_NTS * logs_NTS).sum(-1, dtype=torch.float32)
    return entropies_NT.unflatten(0, (batch, -1)).mean((0, 2))


class _RowEntropies(torch.autograd.Function):
    """-sum_j p_j ln p_j of each row. Its derivative by a score is -p_j (ln p_j + entropy).

    Short rows, in one block, are kept for the backward pass; those of several blocks are computed again.
    """

    @staticmethod
    def forward(ctx: Any, query_NTD: Tensor, key_NTD: Tensor, scaling: float, causal: bool) -> Tensor:
        entropies, kept = [], ()
        for _, logs_NRC in _blocks(query_NTD, key_NTD, scaling, causal):
            weights_NRC = logs_NRC.exp()
            entropies.append(-(weights_NRC * logs_NRC).sum(-1))
            kept = (logs_NRC, weights_NRC)
        entropies_NT = torch.cat(entropies[::-1], dim=1)
        ctx.save_for_backward(query_NTD, key_NTD, entropies_NT, *(kept if len(entropies) == 1 else ()))
        ctx.scaling, ctx.causal = scaling, causal
        return entropies_NT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("head entropies have first derivatives only")
        query_NTD, key_NTD, entropies_NT, *kept = ctx.saved_tensors
        (gradient_NT,) = gradients
        wide = entropies_NT.dtype
        factors_NT1 = (-ctx.scaling * gradient_NT)[..., None]
        query_gradient_NTD = torch.empty_like(query_NTD)
        key_gradient_NTD = torch.zeros_like(key_NTD, dtype=wide)
        blocks = (
            [(slice(query_NTD.shape[1]), kept[0])] if kept else _blocks(query_NTD, key_NTD, ctx.scaling, ctx.causal)
        )
        with torch.autocast(query_NTD.device.type, enabled=False):
            for rows, logs_NRC in blocks:
                keys = slice(logs_NRC.shape[-1])
                score_gradients_NRC = logs_NRC + entropies_NT[:, rows, None]
                score_gradients_NRC *= kept[1] if kept else logs_NRC.exp_()
                # The factor of a row goes to the smaller matrices.
                by_key_NRD = score_gradients_NRC @ key_NTD[:, keys].to(wide) * factors_NT1[:, rows]
                query_gradient_NTD[:, rows] = by_key_NRD.to(query_NTD.dtype)
                scaled_query_NRD = query_NTD[:, rows].to(wide) * factors_NT1[:, rows]
                key_gradient_NTD[:, keys] += score_gradients_NRC.mT @ scaled_query_NRD
        return query_gradient_NTD, key_gradient_NTD.to(key_NTD.dtype), None, None


_row_entropies: Any = torch.compiler.disable(_RowEntropies.apply)


def _blocks(query_NTD: Tensor, key_NTD: Tensor, scaling: float, causal: bool) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and the logarithms of their probabilities (N, R, C): hugely negative, but finite, for hidden keys."""
    tokens = query_NTD.shape[1]
    wide = torch.promote_types(query_NTD.dtype, torch.float32)
    with torch.autocast(query_NTD.device.type, enabled=False):
        # The longest rows first: shorter ones then fit into the memory that those before them freed.
        for start in reversed(range(0, tokens, ROWS)):
            rows = slice(start, min(start + ROWS, tokens))
            keys = rows.stop if causal else tokens
            hidden_RC = query_NTD.new_full((rows.stop - start, keys), torch.finfo(wide).min / 2, dtype=wide)
            query_NRD, key_NCD = query_NTD[:, rows].to(wide), key_NTD[:, :keys].to(wide)
            hidden_RC = hidden_RC.triu_(start + 1 if causal else tokens)
            scores_NRC = torch.baddbmm(hidden_RC, query_NRD, key_NCD.mT, alpha=scaling)
            yield rows, scores_NRC.log_softmax(-1)
