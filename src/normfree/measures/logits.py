"""The largest attention logit of every head."""

# H query heads

from __future__ import annotations

import torch
from torch import Tensor

from normfree.entropy.layers import HeadLayer, Layer, labels
from normfree.entropy.routing import AttentionCall
from normfree.entropy.tap import AttentionTap
from normfree.measures.measure import Measure, Total
from normfree.measures.scores import scores_of


class Logits(Measure):
    """The largest score that a head gives a visible key, before softmax, with scale, bias and soft-capping.

    Scores are computed in float32, a block of rows at a time, so memory is linear in the context; `ranges` shares them.
    Raises UnsupportedModel (a ValueError) for a model that does not route its attention through transformers' registry.
    """

    gives = ("max_logit",)

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._highest: dict[HeadLayer, Tensor] = {}
        self._tap = AttentionTap(model, self._read)

    def attach(self) -> AttentionTap:
        return self._tap

    def _read(self, layer: HeadLayer, call: AttentionCall) -> None:
        highest_H = call.once(scores_of).highest_H
        self._highest[layer] = torch.maximum(highest_H, self._highest.get(layer, highest_H))

    def totals(self) -> dict[str, Total]:
        if not self._highest:
            raise ValueError(
                "no attention call reached transformers' registry; run a forward pass inside the `with` block"
            )
        highest = [self._highest[layer].double().cpu() for layer in sorted(self._highest)]  # layers may differ in heads
        padded_LH = torch.nn.utils.rnn.pad_sequence(highest, batch_first=True, padding_value=torch.nan)
        return {"max_logit": padded_LH.masked_fill(padded_LH == -torch.inf, torch.nan)}  # no row saw a key

    @property
    def layers(self) -> list[Layer]:
        return labels(self._highest)
