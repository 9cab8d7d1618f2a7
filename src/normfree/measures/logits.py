"""The largest attention logit of every head."""

# H query heads

from __future__ import annotations

import torch
from torch import Tensor

from normfree.entropy.layers import HeadLayer
from normfree.entropy.routing import AttentionCall
from normfree.measures.reading import CallMeasure
from normfree.measures.scores import scores_of


class Logits(CallMeasure):
    """The largest score that a head gives a visible key, before softmax, with scale, bias and soft-capping.

    Scores are computed in float32, a block of rows at a time, so memory is linear in the context; `ranges` shares them.
    Raises UnsupportedModel (a ValueError) for a model that does not route its attention through transformers' registry.
    """

    gives = ("max_logit",)

    def read_call(self, layer: HeadLayer, call: AttentionCall) -> None:
        self.raise_to(layer, highest=call.once(scores_of).highest_H)

    def values(self, highest: Tensor) -> dict[str, Tensor]:
        return {"max_logit": highest.masked_fill(highest == -torch.inf, torch.nan)}  # no row saw a key
