"""Optional parts of attention: tables of temperatures, sinks and gates, whose builders take the config.

A temperature is called as `temperature(query_BHTD, positions_BT)` and divides the queries: softmax(q.k / (t sqrt(D))),
so that a probe reads the scores as they are used. A sink gives each row an extra logit m whose probability is assigned
to no token: p_j = exp(s_j) / (exp(m) + sum exp(s)). Here that is one more key, with a value of 0, in front of the
others, so every attention function computes it, with its gradient and without the T x T matrix. A gate is called as
`gate(mixed_BTHD, hidden_BTE)`, with the output of every head and what attention reads (arXiv 2505.06708).
"""

# B batch, H heads, P positions or 1, T query tokens, S key tokens, D head dim, E hidden size, G gates

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class AttentionInput(NamedTuple):
    query_BHTD: Tensor
    key_BHSD: Tensor
    value_BHSD: Tensor
    attention_mask: Tensor | None


class Sink(nn.Module):
    """The extra logit of each head: 0, or learned from 0 on."""

    def __init__(self, heads: int, *, learned: bool) -> None:
        super().__init__()
        self.initial_values = {"logit": 0.0} if learned else {}
        self.logit = nn.Parameter(torch.empty(heads)) if learned else None

    def logits(self, like: Tensor) -> Tensor:
        """(H,) in the dtype of `like`, a (B, H, T, D) tensor."""
        return like.new_zeros(like.shape[1]) if self.logit is None else self.logit.to(like.dtype)

    def prepend(self, inputs: AttentionInput, scaling: float) -> AttentionInput:
        """Put the sink's key before the others, for any attention function.

        Without a mask, attention is causal by order, so a first query goes before the others too; `remove` drops its
        output. A learned logit needs a dimension of its own, in which every query is 1 and every other key 0. Raises
        ValueError for a mask that is no tensor.
        """
        query_BHTD, key_BHSD, value_BHSD, mask = inputs
        if self.logit is not None:
            query_BHTD = F.pad(query_BHTD, (0, 1), value=1.0)
            key_BHSD, value_BHSD = F.pad(key_BHSD, (0, 1)), F.pad(value_BHSD, (0, 1))
        key_BHSD, value_BHSD = (F.pad(states, (0, 0, 1, 0)) for states in (key_BHSD, value_BHSD))
        if self.logit is not None:
            logits_BH11 = (self.logits(key_BHSD) / scaling)[:, None, None].expand(len(key_BHSD), -1, 1, 1)
            key_BHSD = torch.cat([F.pad(logits_BH11, (key_BHSD.shape[-1] - 1, 0)), key_BHSD[:, :, 1:]], dim=2)
        if mask is None:
            if query_BHTD.shape[2] > 1:
                query_BHTD = F.pad(query_BHTD, (0, 0, 1, 0))
        elif not isinstance(mask, Tensor):
            raise ValueError("attention_sink needs attn_implementation='sdpa' or 'eager'")
        else:
            visible = mask.new_full((*mask.shape[:-1], 1), mask.dtype == torch.bool)  # True, or 0 to add
            mask = torch.cat([visible, mask], dim=-1)
        return AttentionInput(query_BHTD, key_BHSD, value_BHSD, mask)

    @staticmethod
    def remove(mixed_BTHD: Tensor, weights_BHTS: Tensor | None, *, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drop the first query, the extra dimension and the sink's weight; `like` is the (B, H, T, D) query."""
        tokens, head_dim = like.shape[2:]
        weights_BHTS = None if weights_BHTS is None else weights_BHTS[:, :, -tokens:, 1:]
        return mixed_BTHD[:, -tokens:, :, :head_dim], weights_BHTS


SINKS: dict[str, Callable[[NormFreeConfig], Sink | None]] = {
    "none": lambda config: None,
    "softmax_1": lambda config: Sink(config.num_attention_heads, learned=False),
    "learned": lambda config: Sink(config.num_attention_heads, learned=True),
}
