"""Where a token stands: a learned vector of each position, or angles by which queries and keys rotate."""

# B batch, H heads, T tokens, E hidden size, D head dim, R rotating dims of a head

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .configuration import NormFreeConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles, each (B or 1, 1, T, R)."""


class LearnedPositions(nn.Module):
    """A learned vector per position, added to the token's."""

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__()
        self.vectors = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, tokens_BTE: Tensor, positions_BT: Tensor) -> tuple[Tensor, None]:
        tokens, longest = tokens_BTE.shape[1], self.vectors.num_embeddings
        if not (self.training or torch.compiler.is_compiling() or _without_values(positions_BT)):
            tokens = int(positions_BT.max()) + 1  # behind a cache, or padding, their number does not say it
        if tokens > longest:
            raise ValueError(f"{tokens} tokens, but max_position_embeddings={longest}: shorten the text")
        return tokens_BTE + self.vectors(positions_BT), None


def _without_values(tensor: Tensor) -> bool:
    """Whether it is a tensor of shapes only, as estimates of memory and operations run a model on."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


class RotaryPositions(nn.Module):
    """Angles by which queries and keys rotate (Su et al. 2021, arXiv 2104.09864).

    The frequencies are computed at each call: a buffer would come back as garbage from `from_pretrained`
    and would be rounded by `.to(torch.bfloat16)`.
    """

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__()
        self.rotary_dim = config.rotary_dim
        self.base = config.rotary_base

    def forward(self, tokens_BTE: Tensor, positions_BT: Tensor) -> tuple[Tensor, Rotation]:
        device = tokens_BTE.device
        exponents = torch.arange(0, self.rotary_dim, 2, device=device, dtype=torch.float32) / self.rotary_dim
        angles = positions_BT[:, None, :, None].float() / self.base**exponents
        angles_B1TR = torch.cat([angles, angles], dim=-1)
        return tokens_BTE, (angles_B1TR.cos(), angles_B1TR.sin())


POSITIONS = {"learned": LearnedPositions, "rotary": RotaryPositions}


def rotate(states_BHTD: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first R dimensions of each head in float32; dimension i pairs with i + R/2 (GPT-NeoX)."""
    cos_B1TR, sin_B1TR = rotation
    rotary_dim = cos_B1TR.shape[-1]
    turning, still = states_BHTD[..., :rotary_dim], states_BHTD[..., rotary_dim:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos_B1TR + torch.cat([-second, first], dim=-1) * sin_B1TR
    return torch.cat([turned.to(states_BHTD.dtype), still], dim=-1)
