"""Quantiles of the losses of single tokens."""

# B batch, T tokens, V vocabulary, N losses

from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from normfree.measures.perplexity import IGNORED, NextToken

_QUANTILES = {"loss_median": 0.5, "loss_99_percent": 0.99, "loss_99_9_percent": 0.999, "loss_worst": 1.0}


class Losses(NextToken):
    """Median, 99 %, 99.9 % and largest next-token loss: numpy's quantiles of all losses, kept in float32."""

    gives = tuple(_QUANTILES)

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._losses: list[Tensor] = []

    def add(self, logits_BTV: Tensor, labels_BT: Tensor) -> None:
        for logits_TV, labels_T in zip(logits_BTV[:, :-1], labels_BT[:, 1:], strict=True):
            losses_T = F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORED, reduction="none")
            self._losses.append(losses_T[labels_T != IGNORED].cpu())

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        losses_N = torch.cat([torch.zeros(0), *self._losses])
        if device is not None and torch.distributed.is_initialized():  # as in `over_processes`
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, losses_N)
            losses_N = torch.cat(parts)
        if not len(losses_N):
            return {name: torch.tensor(torch.nan) for name in self.gives}
        values: Any = np.quantile(losses_N.numpy(), list(_QUANTILES.values()))
        return dict(zip(_QUANTILES, torch.from_numpy(values).double(), strict=True))
