"""What enters the softmax of attention, a block of rows at a time: extremes and a histogram in one pass; Logits."""

# B batch, H query heads, G key heads, T query, S key, D head width, R rows and C columns of one block

from typing import NamedTuple

import torch
from torch import Tensor

from normfree.entropy.layers import HeadLayer
from normfree.entropy.request import Request
from normfree.entropy.routing import AttentionCall
from normfree.entropy.visibility import Block
from normfree.measures.histogram import BINS, NEGATIVE_INFINITE, float_counts
from normfree.measures.reading import CallMeasure

ROWS = 64  # of one block: their scores stay near the cache


class Scores(NamedTuple):
    """Scores of the keys that the rows of a call see, padded rows left out; NaN if one of them is."""

    lowest_H: Tensor  # infinite for a head whose rows see no key
    highest_H: Tensor
    counts: Tensor  # (BINS,) of all heads, see `float_counts`


def scores_of(call: AttentionCall) -> Scores:
    """Form the scores of a call with scale, soft-capping and bias, in float32 or, for a float64 model, float64."""
    request, padded_BHT = call.request(), call.padded
    lowest_H = request.q.new_full((request.q.shape[1],), torch.inf)
    highest_H, counts = -lowest_H, torch.zeros(BINS, dtype=torch.int64, device=request.q.device)
    with torch.autocast(request.q.device.type, enabled=False):
        for block in request.visibility.blocks(ROWS):
            hidden = ~block.visible
            if padded_BHT is not None:
                hidden = hidden | padded_BHT[..., block.start : block.stop, None]
            hiding = torch.zeros_like(hidden, dtype=request.q.dtype).masked_fill_(hidden, torch.inf)
            scores_BHRC = _scores(request, block)
            low_H, high_H = _extremes(scores_BHRC, hiding)
            if bool((low_H + high_H).isnan().any()):  # infinite scores, or NaN, perhaps of hidden keys alone
                scores_BHRC = _scores(request, block).masked_fill_(hidden, 0.0)
                low_H, high_H = _extremes(scores_BHRC, hiding)
            lowest_H, highest_H = torch.minimum(lowest_H, low_H), torch.maximum(highest_H, high_H)
            counts += float_counts(scores_BHRC)
            counts[NEGATIVE_INFINITE] -= hidden.sum() * (scores_BHRC.numel() // hidden.numel())
    return Scores(lowest_H, highest_H, counts)


def _extremes(scores_BHRC: Tensor, hiding: Tensor) -> tuple[Tensor, Tensor]:
    """(H,) lowest and highest scores where `hiding` is 0; where it is infinite, scores become -inf in place."""
    # Adding infinity takes a seventh of the time of filling it in.
    lowest_H = (scores_BHRC + hiding).flatten(2).amin(-1).amin(0)
    return lowest_H, scores_BHRC.sub_(hiding).flatten(2).amax(-1).amax(0)


def _scores(request: Request, block: Block) -> Tensor:
    """(B, H, R, C) scores, of hidden keys too; scaling the queries, and no copies of shared keys, halve the time."""
    q_BHRD = request.q[:, :, block.start : block.stop] * request.scale
    k_BGCD = request.k[:, :, block.first : block.last]
    grouped_BGND = q_BHRD.unflatten(1, (k_BGCD.shape[1], -1)).flatten(2, 3)
    scores_BHRC = (grouped_BGND @ k_BGCD.mT).view(*q_BHRD.shape[:3], -1)
    if request.softcap is not None:
        scores_BHRC = scores_BHRC.div_(request.softcap).tanh_().mul_(request.softcap)
    return scores_BHRC if block.bias is None else scores_BHRC + block.bias


class Logits(CallMeasure):
    """The largest score that a head gives a visible key, before softmax, with scale, bias and soft-capping.

    Scores are computed in float32, a block of rows at a time, so memory is linear in the context; `ranges` shares them.
    """

    gives = ("max_logit",)

    def read_call(self, layer: HeadLayer, call: AttentionCall) -> None:
        self.raise_to(layer, highest=call.once(scores_of).highest_H)

    def values(self, highest: Tensor) -> dict[str, Tensor]:
        return {"max_logit": highest.masked_fill(highest == -torch.inf, torch.nan)}  # no row saw a key
