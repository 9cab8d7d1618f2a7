"""GPT-2 and GPT-NeoX of transformers as our architecture: fields of the config, and names and layout of the weights."""

# H heads, D head dim

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .configuration import NormFreeConfig
from .folding import fold_norms
from .modeling import NormFreeForCausalLM
from .norms import FakeLayerNorm

NORM_FREE_EPSILON = 1e6
"""From this epsilon on a LayerNorm divides by sqrt(epsilon) whatever its input is: "LayerNorm-free" models."""

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_ACTIVATIONS |= {"leaky_relu": "leaky_relu", "linear": "identity"}
_NAMES = {  # parts of names of modules, in both families
    r"^(transformer|gpt_neox)\.": "model.",
    r"\.h\.": ".layers.",
    r"wte|embed_in": "embed_tokens",
    r"wpe": "positions.vectors",
    r"ln_1|input_layernorm": "attention_norm",
    r"ln_2|post_attention_layernorm": "feed_forward_norm",
    r"ln_f|final_layer_norm": "final_norm",
    r"attn\.c_attn|attention\.query_key_value": "attention.qkv",
    r"attn\.c_proj|attention\.dense": "attention.output",
    r"mlp\.(c_fc|dense_h_to_4h)": "feed_forward.input",
    r"mlp\.(c_proj|dense_4h_to_h)": "feed_forward.output",
    r"^embed_out": "lm_head",
}
_NOT_WEIGHTS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|inv_freq$")
"""Buffers that older versions saved."""


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of NormFreeConfig for the content of a config.json.

    Raises ValueError for a model that is not ours, GPT-2 or GPT-NeoX, and what these families have and we have not.
    """
    reader = {"normfree": _normfree, "gpt2": _gpt2, "gpt_neox": _gpt_neox}.get(str(config.get("model_type")))
    if reader is None:
        raise ValueError(f"a model of type {config.get('model_type')!r}; allowed: normfree, gpt2, gpt_neox")
    fields = reader(config)
    if fields.get("norm_epsilon", 0.0) >= NORM_FREE_EPSILON:
        del fields["norm_epsilon"]
        fields |= {"norm": "none", "final_norm": "none", "tie_word_embeddings": False, "output_bias": True}
    return fields


def _normfree(config: Mapping[str, Any]) -> dict[str, Any]:
    default = NormFreeConfig()
    own = {name: config[name] for name in NormFreeConfig.__annotations__ if name in config}
    fields = {name: value for name, value in own.items() if value != getattr(default, name, None)}
    return {"norm": config["norm"], "activation": config["activation"], **fields}


def _gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import GPT2Config

    gpt2: Any = GPT2Config(**config)
    if not gpt2.scale_attn_weights or gpt2.scale_attn_by_inverse_layer_idx:
        raise ValueError("a GPT-2 that scales its attention in another way")
    return {
        "vocab_size": gpt2.vocab_size,
        "hidden_size": gpt2.n_embd,
        "num_hidden_layers": gpt2.n_layer,
        "num_attention_heads": gpt2.n_head,
        "intermediate_size": gpt2.n_inner or 4 * gpt2.n_embd,
        "activation": _activation(gpt2.activation_function),
        "norm": "layernorm",
        "norm_epsilon": gpt2.layer_norm_epsilon,
        "bias": "all",
        "tie_word_embeddings": gpt2.tie_word_embeddings,
    }


def _gpt_neox(config: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import GPTNeoXConfig

    neox: Any = GPTNeoXConfig(**config)
    rotary: Mapping[str, Any] = neox.rope_parameters
    if rotary.get("rope_type", "default") != "default" or not neox.attention_bias:
        raise ValueError("a GPT-NeoX with scaled rotary positions or attention without bias")
    return {
        "vocab_size": neox.vocab_size,
        "hidden_size": neox.hidden_size,
        "num_hidden_layers": neox.num_hidden_layers,
        "num_attention_heads": neox.num_attention_heads,
        "intermediate_size": neox.intermediate_size,
        "activation": _activation(neox.hidden_act),
        "norm": "layernorm",
        "norm_epsilon": neox.layer_norm_eps,
        "residual": "parallel" if neox.use_parallel_residual else "sequential",
        "position": "rotary",
        "rotary_share": rotary.get("partial_rotary_factor", 1.0),
        "rotary_base": float(rotary["rope_theta"]),
        "bias": "all",
        "tie_word_embeddings": neox.tie_word_embeddings,
    }


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r}; allowed: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def convert(theirs: Any) -> NormFreeForCausalLM:
    """Our model with the weights of a GPT-2 or GPT-NeoX of transformers, in evaluation mode: the same logits.

    LayerNorms with an epsilon of `NORM_FREE_EPSILON` or more divide by sqrt(epsilon) whatever their input is; they are
    folded, so that the model has no norm. Raises ValueError as `fields_of` does.
    """
    config: dict[str, Any] = theirs.config.to_dict()
    fields = fields_of(config) | {"max_position_embeddings": theirs.config.max_position_embeddings}
    weights = _converted_weights(theirs.state_dict(), theirs.config.num_attention_heads)
    if not fields.get("output_bias"):
        return _loaded(NormFreeConfig(**fields), weights)
    epsilon = config.get("layer_norm_epsilon", config.get("layer_norm_eps"))
    tied = theirs.config.tie_word_embeddings
    fields |= {
        "norm": "fake",
        "final_norm": "fake",
        "fake_start_step": 1,
        "tie_word_embeddings": tied,
        "output_bias": False,
    }
    model = _loaded(NormFreeConfig(**fields), weights)
    for norm in model.modules():
        if isinstance(norm, FakeLayerNorm):
            norm.is_fixed.fill_(1.0)
            norm.sigma_first.fill_(epsilon**0.5)
            norm.sigma_rest.fill_(epsilon**0.5)
    return fold_norms(model)


def _loaded(config: NormFreeConfig, weights: Mapping[str, Tensor]) -> NormFreeForCausalLM:
    with torch.random.fork_rng(devices=[]):
        model = NormFreeForCausalLM._from_config(config)
    buffers = {name for name, _ in model.named_buffers()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if wrong := sorted((set(missing) - buffers - tied) | set(unexpected)):
        raise ValueError(f"weights that do not fit our architecture: {', '.join(wrong[:3])}")
    return model.eval()


def _converted_weights(weights: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The weights under our names, in our layout."""
    converted = {}
    for name, weight in weights.items():
        if _NOT_WEIGHTS.search(name):
            continue
        if re.search(r"\.c_(attn|proj|fc)\.weight$", name):
            weight = weight.t()  # GPT-2 stores (input, output)
        if "query_key_value" in name:  # rows from (H, 3, D), by head, to (3, H, D): all queries first
            weight = weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        for theirs, ours in _NAMES.items():
            name = re.sub(theirs, ours, name)
        converted[name] = weight
    return converted
