"""Temperatures and gates of attention, by names of `NormFreeConfig.attention_temperature` and `.attention_gate`.

A builder takes the config. A temperature is called as `temperature(query_BHTD, positions_BT)` and divides the queries:
softmax(q.k / (t sqrt(D))), so that a probe reads the scores as they are used. A gate is called as
`gate(mixed_BTHD, hidden_BTE)`, with the output of every head and what attention reads (arXiv 2505.06708).
"""

# B batch, H heads, P positions or 1, T tokens, D head dim, E hidden size, G gates

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .configuration import NormFreeConfig


class Unchanged(nn.Module):
    """No temperature, or no gate."""

    def forward(self, states: Tensor, ignored: Tensor) -> Tensor:
        return states


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
    "fixed": lambda config: Unchanged(),
    "head": lambda config: LearnedTemperature(config.num_attention_heads, 1),
    "position": lambda config: LearnedTemperature(config.num_attention_heads, config.max_position_embeddings),
}


class SigmoidGate(nn.Module):
    """Multiply by sigmoid(x W), one gate for each head or for each channel of a head."""

    def __init__(self, hidden_size: int, gates: int) -> None:
        super().__init__()
        self.projection = nn.Linear(hidden_size, gates, bias=False)

    def forward(self, mixed_BTHD: Tensor, hidden_BTE: Tensor) -> Tensor:
        gates_BTG = torch.sigmoid(self.projection(hidden_BTE))
        return mixed_BTHD * gates_BTG.unflatten(-1, (mixed_BTHD.shape[2], -1))


GATES: dict[str, Callable[[NormFreeConfig], nn.Module]] = {
    "none": lambda config: Unchanged(),
    "head": lambda config: SigmoidGate(config.hidden_size, config.num_attention_heads),
    "channel": lambda config: SigmoidGate(config.hidden_size, config.hidden_size),
}
