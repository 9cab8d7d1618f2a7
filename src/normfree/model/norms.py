"""Normalizations: a table from names of `NormFreeConfig.norm` and `.final_norm` to builders.

A builder takes the config and returns a module that maps (B, T, E) to (B, T, E).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .configuration import NormFreeConfig


NORMS: dict[str, Callable[[NormFreeConfig], nn.Module]] = {
    "layernorm": lambda config: nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon),
    "none": lambda config: nn.Identity(),  # measured: 8 calls cost under 0.01 % of a 4 x 128 step
}
IN_THIS_FILE = dict(NORMS)
"""The entries that are saved with a model: those of this file."""
