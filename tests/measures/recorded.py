"""What enters modules of a model, written down by a hook of the tests' own."""

# N tokens, F features

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel


def recorded(model: PreTrainedModel, inputs: dict[str, Any], before: Iterable[Any]) -> dict[nn.Module, np.ndarray]:
    """(N, F) float64 first inputs of modules in a forward pass."""
    values: dict[nn.Module, np.ndarray] = {}

    def keep(module: nn.Module, positional: tuple[Any, ...]) -> None:
        values[module] = positional[0].reshape(-1, positional[0].shape[-1]).double().numpy().copy()

    hooks = [module.register_forward_pre_hook(keep) for module in before]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return values
