"""Gates on the output of attention: a table from names of `NormFreeConfig.attention_gate` to builders.

A builder takes the config and returns a module called as `gate(mixed_BTHD, hidden_BTE)`, where `mixed_BTHD` is the
output of every head and `hidden_BTE` what attention reads (arXiv 2505.06708).
"""

# B batch, T tokens, H heads, D head dim, E hidden size

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .configuration import NormFreeConfig


class NoGate(nn.Module):
    def forward(self, mixed_BTHD: Tensor, hidden_BTE: Tensor) -> Tensor:
        return mixed_BTHD


class SigmoidGate(nn.Module):
    """Multiply by sigmoid(x W), one gate for each head or for each channel of a head."""

    def __init__(self, hidden_size: int, gates: int) -> None:
        super().__init__()
        self.projection = nn.Linear(hidden_size, gates, bias=False)

    def forward(self, mixed_BTHD: Tensor, hidden_BTE: Tensor) -> Tensor:
        gates_BTG = torch.sigmoid(self.projection(hidden_BTE))
        return mixed_BTHD * gates_BTG.unflatten(-1, (mixed_BTHD.shape[2], -1))


GATES: dict[str, Callable[[NormFreeConfig], nn.Module]] = {
    "none": lambda config: NoGate(),
    "head": lambda config: SigmoidGate(config.hidden_size, config.num_attention_heads),
    "channel": lambda config: SigmoidGate(config.hidden_size, config.hidden_size),
}
