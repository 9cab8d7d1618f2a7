"""Tiny random models of the families of text, encoders, pairs of both, and images, and what enters their modules."""

# N tokens, F features

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.entropy.families import tiny_config

IDS = torch.arange(3, 27).view(2, 12)
KINDS = {
    "text": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "encoder": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "pair": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}


def kind_of(model_type: str) -> str:
    return next(kind for kind, names in KINDS.items() if model_type in names)


def random_model(model_type: str, *, device: str = "cpu") -> PreTrainedModel:
    """A tiny model with noise on every parameter, so that no scale is 1 and no branch 0."""
    auto: Any = AutoModelForCausalLM if kind_of(model_type) == "text" else AutoModel
    torch.manual_seed(0)
    with torch.device(device):
        model = auto.from_config(tiny_config(model_type)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 and "norm" not in name:
                    nn.init.normal_(parameter, std=0.2)
                elif parameter.dim() < 2:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def inputs_of(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    if kind == "image":
        config: Any = model.config
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(1, config.num_channels, size, size)}
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :7]} if kind == "pair" else {})


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
