"""Next-token cross-entropy without the logits of all tokens alive at once.

Shape legend: N tokens, E hidden size, V vocabulary; n tokens of one block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
LARGEST_BLOCK = 1024
LARGEST_LOGITS = 2**24
"""Elements of a block's logits: 64 MiB in float32."""


def next_token_loss(
    hidden_BTE: Tensor,
    weight_VE: Tensor,
    labels_BT: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy in nats of each label from the hidden state before it, summed and divided.

    `labels_BT` are shifted here, and -100 is left out. The divisor is `num_items_in_batch`, or the number of labels
    that count; NaN where that is 0. Matmuls run in autocast's dtype where autocast is on; softmax and sums are float32,
    those of the weight's gradient over blocks too. The same numbers as through all logits, up to rounding.
    """
    hidden_NE, labels_N = hidden_BTE[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()
    device = hidden_NE.device.type
    if torch.is_autocast_enabled(device):
        hidden_NE = hidden_NE.to(torch.get_autocast_dtype(device))
    total = _summed_cross_entropy(hidden_NE, weight_VE, labels_N, torch.is_grad_enabled())
    items = (labels_N != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / items


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies, block by block; the gradients are made in the same pass, while the logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, wanted: bool) -> Tensor:
        vocabulary = len(weight_VE)
        size = min(LARGEST_BLOCK, max(1, LARGEST_LOGITS // vocabulary))
        cast_VE = weight_VE.to(hidden_NE.dtype)
        hidden_gradient_NE = torch.empty_like(hidden_NE) if wanted else None
        weight_gradient_VE = torch.zeros_like(weight_VE, dtype=torch.float32) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_NE.device)
        with torch.autocast(hidden_NE.device.type, enabled=False):
            for start in range(0, len(hidden_NE), size):
                block_nE, labels_n = hidden_NE[start : start + size], labels_N[start : start + size]
                logits_nV = (block_nE @ cast_VE.mT).float()
                losses_n1, gradient_nV = _losses_and_logit_gradient(logits_nV, labels_n[:, None])
                total += losses_n1.sum()
                if hidden_gradient_NE is None or weight_gradient_VE is None:
                    continue
                logit_gradient_nV = gradient_nV.to(hidden_NE.dtype)
                hidden_gradient_NE[start : start + size] = logit_gradient_nV @ cast_VE
                weight_gradient_VE += logit_gradient_nV.mT @ block_nE
        ctx.save_for_backward(hidden_gradient_NE, weight_gradient_VE)
        ctx.weight_dtype = weight_VE.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph=True; the gradients kept in forward would pass for constants
            raise RuntimeError("this loss has first derivatives only; without return_logits=False it has all of them")
        (of_total,) = gradients
        hidden_gradient_NE, weight_gradient_VE = ctx.saved_tensors
        return of_total * hidden_gradient_NE, (of_total * weight_gradient_VE).to(ctx.weight_dtype), None, None


# A compiler would unroll the blocks; outside of it, the layers before stay one graph.
_summed_cross_entropy: Any = torch.compiler.disable(_SummedCrossEntropy.apply)


def _losses_and_logit_gradient(logits_nV: Tensor, labels_n1: Tensor) -> tuple[Tensor, Tensor]:
    """-ln softmax at each label, and softmax minus one at the label; both 0 where the label does not count.

    Overwrites the logits with the gradient: exp is taken once for both.
    """
    counts_n1 = labels_n1 != IGNORED
    targets_n1 = labels_n1.where(counts_n1, 0)
    shifted_nV = logits_nV.sub_(logits_nV.amax(-1, keepdim=True))
    of_targets_n1 = shifted_nV.gather(1, targets_n1)
    sums_n1 = shifted_nV.exp_().sum(-1, keepdim=True)
    losses_n1 = (sums_n1.log() - of_targets_n1).where(counts_n1, 0.0)
    probabilities_nV = shifted_nV.mul_(counts_n1 / sums_n1)
    return losses_n1, probabilities_nV.scatter_add_(1, targets_n1, -counts_n1.float())
