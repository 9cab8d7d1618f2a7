"""Tokens of a text, or of an image: a table from names of `NormFreeConfig.family` to builders."""

# B batch, C channels, P pixels on each side of an image, T tokens, E hidden size

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .configuration import NormFreeConfig


class PatchEmbedding(nn.Module):
    """A linear map of each patch, row by row, behind a learned class token if `pooling` reads one."""

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__()
        self.shape = (config.num_channels, config.image_size, config.image_size)
        self.patch_size = config.patch_size
        self.projection = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        has_token = config.pooling == "class_token"
        self.class_token = nn.Parameter(torch.empty(config.hidden_size)) if has_token else None

    def forward(self, pixels_BCPP: Tensor) -> Tensor:
        """(B, T, E). Raises ValueError for images of another shape."""
        if pixels_BCPP.shape[1:] != self.shape:
            given, needed = (" x ".join(map(str, shape)) for shape in (pixels_BCPP.shape[1:], self.shape))
            raise ValueError(f"images of {given} (channels, height, width), but the model reads {needed}")
        pixels_BCPP = pixels_BCPP.to(self.projection.weight.dtype)
        rows = pixels_BCPP.unflatten(3, (-1, self.patch_size)).unflatten(2, (-1, self.patch_size))
        tokens_BTE = self.projection(rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        if self.class_token is None:
            return tokens_BTE
        first_B1E = self.class_token.to(tokens_BTE.dtype).expand(len(tokens_BTE), 1, -1)
        return torch.cat([first_B1E, tokens_BTE], dim=1)


EMBEDDINGS: dict[str, Callable[[NormFreeConfig], nn.Module]] = {
    "decoder": lambda config: nn.Embedding(config.vocab_size, config.hidden_size),
    "vision": PatchEmbedding,
    "encoder_decoder": lambda config: nn.Embedding(config.vocab_size, config.hidden_size),
}
