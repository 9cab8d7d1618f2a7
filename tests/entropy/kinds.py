"""Tiny random models that are no causal language models, with inputs for them and the entropies of their matrices."""

# B batch, H heads, T query, S key

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from tests.entropy.families import TINY, known_sizes, with_large_weights

SHAPES = TINY | {"projection_dim": 16, "max_source_positions": 8, "max_target_positions": 64, "num_mel_bins": 8}
SHAPES |= {"d_kv": 8, "d_ff": 48, "num_decoder_layers": 2, "embedding_size": 32, "dim": 32, "hidden_dim": 48}
SHAPES |= {"n_heads": 4, "n_layers": 2, "image_size": 16, "patch_size": 4, "num_channels": 3, "local_attention": 6}
SHAPES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
IDS = torch.arange(3, 43).view(2, 20)
TARGETS = torch.arange(50, 64).view(2, 7)
PADDED = torch.ones(2, 20, dtype=torch.long)
PADDED[0, :6] = 0
PADDED_TARGETS = torch.ones(2, 7, dtype=torch.long)
PADDED_TARGETS[1, :2] = 0
SIDES = {"left": (PADDED, PADDED_TARGETS), "right": (PADDED.flip(1), PADDED_TARGETS.flip(1))}


def tiny_kind(model_type: str, **own: Any) -> PreTrainedModel:
    """A random model of any type in evaluation mode, whose heads are neither uniform nor collapsed."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**_sizes(CONFIG_MAPPING[model_type]) | own)
    return with_large_weights(AutoModel.from_config(config).eval())


def _sizes(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    parts = {name: part for name, part in config_class.sub_configs.items() if part.__name__ != "AutoConfig"}
    return known_sizes(config_class, SHAPES) | {name: _sizes(part) for name, part in parts.items()}


def inputs_of(model: PreTrainedModel, side: str = "left") -> dict[str, Tensor]:
    """Inputs of everything that the model reads: text padded on one side, images, sound, a target."""
    mask, target_mask = SIDES[side]
    torch.manual_seed(1)
    every = {"input_ids": IDS, "attention_mask": mask}
    every |= {"decoder_input_ids": TARGETS, "decoder_attention_mask": target_mask}
    every |= {"pixel_values": torch.randn(2, 3, 16, 16), "input_features": torch.randn(2, 8, 16)}
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" not in accepted:
        del every["attention_mask"]
    return {name: value for name, value in every.items() if name in accepted}


def matrices_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """(B, H, T, S) probabilities in float64 of every layer of the eager twin, by the label of the layer."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        output = twin(**inputs, output_attentions=True)
    fields = {"": "attentions", "encoder": "encoder_attentions", "decoder": "decoder_attentions"}
    groups = {group: getattr(output, name, None) for group, name in (fields | {"cross": "cross_attentions"}).items()}
    for group in ("vision", "text"):
        groups[group] = getattr(getattr(output, f"{group}_model_output", None), "attentions", None)
    layers = [(group, n, p_BHTS) for group, each in groups.items() for n, p_BHTS in enumerate(each or ())]
    return {f"{group} {n}".strip(): p_BHTS.double() for group, n, p_BHTS in layers}


def real_queries(label: str, p_BHTS: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """(B, T) True for queries that are no padding."""
    name = "decoder_attention_mask" if label.startswith(("decoder", "cross")) else "attention_mask"
    mask = None if label.startswith("vision") else inputs.get(name)
    return torch.ones(p_BHTS.shape[0], p_BHTS.shape[2], dtype=torch.bool) if mask is None else mask.bool()
