"""The largest attention logit of every head."""

# B batch, H query heads, D head width, R rows of one block, C columns of one block

from __future__ import annotations

import torch
from torch import Tensor

from normfree.entropy.request import Request
from normfree.entropy.swap import AttentionTap
from normfree.entropy.visibility import ROWS
from normfree.measures.measure import Measure, Total


class Logits(Measure):
    """The largest score that a head gives a visible key, before softmax, with scale, bias and soft-capping.

    Scores are computed in float32, a block of rows at a time, so memory is linear in the context. Raises
    UnsupportedModel (a ValueError) for a model that does not route its attention through transformers' registry.
    """

    gives = ("max_logit",)

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._highest: dict[int, Tensor] = {}
        self._tap = AttentionTap(model, self._read)

    def attach(self) -> AttentionTap:
        return self._tap

    def _read(self, layer: int, request: Request) -> None:
        keys = request.k.repeat_interleave(request.groups, dim=1)
        for block in request.visibility.blocks(ROWS):
            if block.first == block.last:  # no row of this block sees a key
                continue
            scores_BHRC = (
                request.scale * request.q[:, :, block.start : block.stop] @ keys[:, :, block.first : block.last].mT
            )
            if request.softcap is not None:
                scores_BHRC = request.softcap * torch.tanh(scores_BHRC / request.softcap)
            if block.bias is not None:
                scores_BHRC = scores_BHRC + block.bias
            highest_H = scores_BHRC.masked_fill(~block.visible, -torch.inf).amax((0, 2, 3))
            before_H = self._highest.get(layer)
            self._highest[layer] = highest_H if before_H is None else torch.maximum(before_H, highest_H)

    def totals(self) -> dict[str, Total]:
        if not self._highest:
            raise ValueError(
                "no attention call reached transformers' registry; run a forward pass inside the `with` block"
            )
        highest = [self._highest[layer].double().cpu() for layer in self.layers]  # layers may differ in heads
        return {"max_logit": torch.nn.utils.rnn.pad_sequence(highest, batch_first=True, padding_value=torch.nan)}

    @property
    def layers(self) -> list[int]:
        return sorted(self._highest)
