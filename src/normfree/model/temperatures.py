"""The temperature of attention: a table from names of `NormFreeConfig.attention_temperature` to builders.

A builder takes the config and returns a module called as `temperature(query_BHTD, positions_BT)`, which divides the
queries: softmax(q.k / (t sqrt(D))), so that a probe reads the scores as they are used.
"""

# B batch, H heads, P positions or 1, T tokens, D head dim

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .configuration import NormFreeConfig


class FixedTemperature(nn.Module):
    def forward(self, query_BHTD: Tensor, positions_BT: Tensor) -> Tensor:
        return query_BHTD


class LearnedTemperature(nn.Module):
    """One temperature for each head, or for each head and query position; all start at 1 (arXiv 2501.03489)."""

    def __init__(self, heads: int, positions: int) -> None:
        super().__init__()
        self.initial_values = {"value": 1.0}
        self.heads = heads
        self.value = nn.Parameter(torch.empty(heads * positions))  # flat: matrices have weight decay

    def forward(self, query_BHTD: Tensor, positions_BT: Tensor) -> Tensor:
        value_HP = self.value.to(query_BHTD.dtype).view(self.heads, -1)
        if value_HP.shape[1] == 1:
            return query_BHTD / value_HP[:, :, None]
        return query_BHTD / value_HP[:, positions_BT].transpose(0, 1)[..., None]


TEMPERATURES: dict[str, Callable[[NormFreeConfig], nn.Module]] = {
    "fixed": lambda config: FixedTemperature(),
    "head": lambda config: LearnedTemperature(config.num_attention_heads, 1),
    "position": lambda config: LearnedTemperature(config.num_attention_heads, config.max_position_embeddings),
}
