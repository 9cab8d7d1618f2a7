"""Where the norms of a branch sit and how it joins the stream: tables for `NormFreeConfig.placement` and `.branch`.

x is the residual stream, F attention or feed-forward. A placement names places, each with a norm of its own: `input` is
x + F(N(x)), `output` is x + N(F(x)), `stream` is N(x + F(x)). The builder of a branch takes the config and the part,
and returns a module called as `join(stream, written)`, both (B, T, E), where `written` is what F computes.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from .configuration import NormFreeConfig

Part = Literal["attention", "feed_forward"]


def _mixed(config: NormFreeConfig, layer: int) -> set[str]:
    layers = config.num_hidden_layers
    post = min(max(int(config.post_share * layers + 0.5), 1), layers - 1)  # at least one of either
    return {"stream"} if layer < post else {"input"}


PLACEMENTS: dict[str, Callable[[NormFreeConfig, int], set[str]]] = {
    "pre": lambda config, layer: {"input"},
    "post": lambda config, layer: {"stream"},
    "peri": lambda config, layer: {"input", "output"},
    "mix": _mixed,
}


class Add(nn.Module):
    """stream + factor * written, with a fixed factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, stream: Tensor, written: Tensor) -> Tensor:
        return stream + (written if self.factor == 1.0 else self.factor * written)


class AddScaled(nn.Module):
    """stream + scale * written, with a learnable scale for each channel (LayerScale) or for all (ReZero)."""

    def __init__(self, channels: int, start: float) -> None:
        super().__init__()
        self.initial_values = {"scale": start}
        self.scale = nn.Parameter(torch.empty(channels))

    def forward(self, stream: Tensor, written: Tensor) -> Tensor:
        return stream + self.scale * written


class AddWeighted(nn.Module):
    """stream_weight * stream + written / divisor, two learnable scalars (scaled FFN, arXiv 2501.03489)."""

    def __init__(self) -> None:
        super().__init__()
        self.initial_values = {"stream_weight": 1.0, "divisor": 1.0}
        self.stream_weight, self.divisor = (nn.Parameter(torch.empty(1)) for _ in range(2))

    def forward(self, stream: Tensor, written: Tensor) -> Tensor:
        return self.stream_weight * stream + written / self.divisor


def layerscale_start(layers: int) -> float:
    """Initial LayerScale at a depth: 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond (CaiT, arXiv 2103.17239)."""
    return 0.1 if layers <= 18 else 1e-5 if layers <= 24 else 1e-6


BRANCHES: dict[str, Callable[[NormFreeConfig, Part], nn.Module]] = {
    "plain": lambda config, part: Add(),
    "scaled_ffn": lambda config, part: AddWeighted() if part == "feed_forward" else Add(),
    "layerscale": lambda config, part: AddScaled(config.hidden_size, layerscale_start(config.num_hidden_layers)),
    "rezero": lambda config, part: AddScaled(1, 0.0),
    # 0.2 at 18 layers (OP block, arXiv 2405.19279), scaled by depth.
    "fixed": lambda config, part: Add(0.2 * (18 / config.num_hidden_layers) ** 0.5),
}
