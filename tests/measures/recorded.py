"""What enters and leaves modules of a model, written down by hooks of the tests' own."""

# N tokens, F features

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel


def recorded(model: PreTrainedModel, inputs: dict[str, Any], before: list[Any] = [], after: list[Any] = []) -> Any:  # noqa: B006
    """(N, F) float64 first inputs of the modules `before` and outputs of the modules `after`, by module."""
    values: dict[nn.Module, np.ndarray] = {}

    def keep(module: nn.Module, value: torch.Tensor) -> None:
        values[module] = value.reshape(-1, value.shape[-1]).double().numpy().copy()

    hooks = [module.register_forward_pre_hook(lambda module, args: keep(module, args[0])) for module in before]
    hooks += [module.register_forward_hook(lambda module, _, output: keep(module, output)) for module in after]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return values
