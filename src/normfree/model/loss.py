"""Cross-entropy of tokens without the logits of all of them in memory at once."""

# N tokens, E hidden size, V vocabulary; n tokens of one block

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
LARGEST_BLOCK = 1024
LARGEST_LOGITS = 2**24
"""Most elements of a block's logits: 64 MiB in float32."""
LARGEST_LOGITS_ON_GPU = 2**26
"""Larger there, since each block adds to the gradient of the whole weight: 0.8 GB with gradients, 12 bytes each."""


def block_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are formed at once."""
    if device.type == "cuda":
        return max(1, LARGEST_LOGITS_ON_GPU // vocabulary)
    return min(LARGEST_BLOCK, max(1, LARGEST_LOGITS // vocabulary))


def next_token_loss(
    hidden_BTE: Tensor, weight_VE: Tensor, labels_BT: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy in nats of each label given the hidden state before it, summed and divided.

    This shifts `labels_BT` and ignores -100. The divisor is `num_items_in_batch` or the number of labels that count;
    the loss is NaN if that is 0. Matmuls run in autocast's dtype; softmax and sums are float32, also the sum of the
    weight's gradient over blocks. The result equals that of all logits at once, up to rounding.
    """
    return token_loss(hidden_BTE[:, :-1].flatten(0, 1), weight_VE, labels_BT[:, 1:].flatten(), num_items_in_batch)


def token_loss(
    hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """The same of each label given the hidden state of its own row."""
    device = hidden_NE.device.type
    if torch.is_autocast_enabled(device):
        hidden_NE = hidden_NE.to(torch.get_autocast_dtype(device))
    total = _summed_cross_entropy(hidden_NE, weight_VE, labels_N, torch.is_grad_enabled())
    items = (labels_N != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / items


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies, block by block; forward also computes the gradients, while the logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, needs_gradients: bool) -> Tensor:
        size = block_tokens(len(weight_VE), weight_VE.device)
        cast_VE = weight_VE.to(hidden_NE.dtype)
        hidden_gradient_NE = torch.empty_like(hidden_NE) if needs_gradients else None
        weight_gradient_VE = torch.zeros_like(weight_VE, dtype=torch.float32) if needs_gradients else None
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
        if torch.is_grad_enabled():  # create_graph=True: it would take the gradients from forward as constants
            raise RuntimeError("return_logits=False gives first derivatives only: leave it out")
        (of_total,) = gradients
        hidden_gradient_NE, weight_gradient_VE = ctx.saved_tensors
        return of_total * hidden_gradient_NE, (of_total * weight_gradient_VE).to(ctx.weight_dtype), None, None


# A compiler would unroll the blocks; without them the layers before stay one graph.
_summed_cross_entropy: Any = torch.compiler.disable(_SummedCrossEntropy.apply)


def _losses_and_logit_gradient(logits_nV: Tensor, labels_n1: Tensor) -> tuple[Tensor, Tensor]:
    """-ln softmax at each label, and softmax minus one at the label; both 0 if the label is ignored.

    Overwrites the logits with the gradient, so that exp is computed once for both.
    """
    counts_n1 = labels_n1 != IGNORED
    targets_n1 = labels_n1.where(counts_n1, 0)
    shifted_nV = logits_nV.sub_(logits_nV.amax(-1, keepdim=True))
    of_targets_n1 = shifted_nV.gather(1, targets_n1)
    sums_n1 = shifted_nV.exp_().sum(-1, keepdim=True)
    losses_n1 = (sums_n1.log() - of_targets_n1).where(counts_n1, 0.0)
    probabilities_nV = shifted_nV.mul_(counts_n1 / sums_n1)
    return losses_n1, probabilities_nV.scatter_add_(1, targets_n1, -counts_n1.float())
