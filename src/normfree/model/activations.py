"""Activations of the feed-forward part: a table from names of `NormFreeConfig.activation` to builders.

A builder takes the config and returns a module called as `activation(features, shared_slope)`: features of any shape,
and the model's one shared slope, (1,), or None. The model passes it in each call, because a parameter that several
blocks register is lost when an untied model is saved and loaded.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import NormFreeConfig


class Elementwise(nn.Module):
    """A fixed function, which ignores the shared slope."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, features: Tensor, shared_slope: Tensor | None) -> Tensor:
        return self.function(features)


class LearnableLeakyReLU(nn.Module):
    """Leaky ReLU with one learnable slope of its own, or with the slope that the model passes to every block."""

    def __init__(self, *, own_slope: bool) -> None:
        super().__init__()
        # The model's _init_weights fills it.
        self.negative_slope = nn.Parameter(torch.empty(1)) if own_slope else None

    def forward(self, features: Tensor, shared_slope: Tensor | None) -> Tensor:
        slope = cast(Tensor, shared_slope if self.negative_slope is None else self.negative_slope)
        return F.prelu(features, slope.to(features.dtype))  # under autocast the features are bf16, the slope fp32


LEAKY_RELUS: dict[str, Callable[[NormFreeConfig], nn.Module]] = {
    "none": lambda config: Elementwise(partial(F.leaky_relu, negative_slope=config.negative_slope)),
    "per_layer": lambda config: LearnableLeakyReLU(own_slope=True),
    "shared": lambda config: LearnableLeakyReLU(own_slope=False),
}

ACTIVATIONS: dict[str, Callable[[NormFreeConfig], nn.Module]] = {
    "gelu": lambda config: Elementwise(F.gelu),
    "gelu_tanh": lambda config: Elementwise(partial(F.gelu, approximate="tanh")),
    "relu": lambda config: Elementwise(F.relu),
    "leaky_relu": lambda config: LEAKY_RELUS[config.learnable_slope](config),
    "identity": lambda config: Elementwise(torch.positive),  # returns its input
}
IN_THIS_FILE = dict(ACTIVATIONS)
"""The entries that are saved with a model: those of this file."""
