"""Positions of tokens: a learned vector for each, angles by which queries and keys rotate, or a bias of scores."""

# B batch, H heads, T tokens, S keys, E hidden size, D head dim, R rotating dims of a head

import math

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .configuration import NormFreeConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles, each (B or 1, 1, T, R)."""


class Positions(nn.Module):
    """Base of what is called with tokens and positions; returns the placed tokens, and angles or None."""

    def add_to(self, mask: Tensor | None, tokens: int, *, is_causal: bool) -> Tensor | None:
        """The mask of attention of an encoder-decoder's stack, with what positions add to the scores."""
        return mask


class LearnedPositions(Positions):
    """A learned vector for each position, added to the embedding of the token."""

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__()
        self.vectors = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, tokens_BTE: Tensor, positions_BT: Tensor) -> tuple[Tensor, None]:
        tokens, longest = tokens_BTE.shape[1], self.vectors.num_embeddings
        # Estimates of memory and operations run a model on tensors that have shapes only.
        has_values = not (positions_BT.is_meta or isinstance(positions_BT, FakeTensor))
        if has_values and not self.training and not torch.compiler.is_compiling():
            tokens = int(positions_BT.max()) + 1  # with a cache or padding, the number of tokens is not enough
        if tokens > longest:
            raise ValueError(f"{tokens} tokens, but max_position_embeddings={longest}: shorten the text")
        return tokens_BTE + self.vectors(positions_BT), None


class RotaryPositions(Positions):
    """Angles by which queries and keys rotate (Su et al. 2021, arXiv 2104.09864).

    Each call computes the frequencies: a buffer would have garbage in it after `from_pretrained`, and
    `.to(torch.bfloat16)` would round it.
    """

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__()
        self.rotary_dim, self.base = config.rotary_dim, config.rotary_base

    def forward(self, tokens_BTE: Tensor, positions_BT: Tensor) -> tuple[Tensor, Rotation]:
        device = tokens_BTE.device
        exponents = torch.arange(0, self.rotary_dim, 2, device=device, dtype=torch.float32) / self.rotary_dim
        angles = positions_BT[:, None, :, None].float() / self.base**exponents
        angles_B1TR = torch.cat([angles, angles], dim=-1)
        return tokens_BTE, (angles_B1TR.cos(), angles_B1TR.sin())


class RelativePositions(Positions):
    """A learned number for each head and bucket of distances, added to the scores (T5, arXiv 1910.10683)."""

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__()
        self.buckets, self.distance = config.relative_buckets, config.relative_distance
        self.values = nn.Embedding(config.relative_buckets, config.num_attention_heads)

    def forward(self, tokens_BTE: Tensor, positions_BT: Tensor) -> tuple[Tensor, None]:
        return tokens_BTE, None

    def add_to(self, mask: Tensor | None, tokens: int, *, is_causal: bool) -> Tensor:
        """(1 or B, H, T, T): the bias of scores, hugely negative where the mask, or causality without one, hides."""
        places_T = torch.arange(tokens, device=self.values.weight.device)
        later_TT = places_T - places_T[:, None]
        bias_1HTT = self.values(self.bucket(later_TT, is_causal=is_causal)).permute(2, 0, 1)[None]
        if mask is None:
            mask = later_TT <= 0 if is_causal else torch.ones_like(later_TT, dtype=torch.bool)
        if mask.dtype != torch.bool:
            return bias_1HTT + mask
        return bias_1HTT.masked_fill(~mask, torch.finfo(bias_1HTT.dtype).min)

    def bucket(self, later: Tensor, *, is_causal: bool) -> Tensor:
        """The bucket of keys so many tokens later than the query; all later ones are in the first if causal."""
        buckets = self.buckets if is_causal else self.buckets // 2
        distance = -later.clamp(max=0) if is_causal else later.abs()
        exact = buckets // 2
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.distance / exact)
        far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        return torch.where(distance < exact, distance, far) + (0 if is_causal else buckets * (later > 0))


POSITIONS = {"learned": LearnedPositions, "rotary": RotaryPositions, "relative": RelativePositions}


def rotate(states_BHTD: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first R dimensions of each head in float32; dimension i pairs with i + R/2 (GPT-NeoX)."""
    cos_B1TR, sin_B1TR = rotation
    rotary_dim = cos_B1TR.shape[-1]
    states_BHTR, unchanged = states_BHTD[..., :rotary_dim], states_BHTD[..., rotary_dim:]
    first, second = states_BHTR.chunk(2, dim=-1)
    rotated_BHTR = states_BHTR * cos_B1TR + torch.cat([-second, first], dim=-1) * sin_B1TR
    return torch.cat([rotated_BHTR.to(states_BHTD.dtype), unchanged], dim=-1)
