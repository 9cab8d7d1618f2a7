"""Convert transformers' GPT-2 and GPT-NeoX (Pythia) models to a NormFreeForCausalLM.

What our architecture cannot express is refused by name; nothing is dropped in silence.
"""

# H heads, D head dim

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from normfree.model import NormFreeConfig, NormFreeForCausalLM

# transformers' names of activations -> ours.
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",  # its constant has ten digits
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "leaky_relu": "leaky_relu",  # both with slope 0.01
    "linear": "identity",
    "relu": "relu",
}
# transformers' names of modules -> ours; * is the number of a layer.
GPT2_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.wpe": "model.positions.vectors",
    "transformer.h.*.ln_1": "model.layers.*.attention_norm",
    "transformer.h.*.attn.c_attn": "model.layers.*.attention.qkv",
    "transformer.h.*.attn.c_proj": "model.layers.*.attention.output",
    "transformer.h.*.ln_2": "model.layers.*.feed_forward_norm",
    "transformer.h.*.mlp.c_fc": "model.layers.*.feed_forward.input",
    "transformer.h.*.mlp.c_proj": "model.layers.*.feed_forward.output",
    "transformer.ln_f": "model.final_norm",
    "lm_head": "lm_head",
}
NEOX_NAMES = {
    "gpt_neox.embed_in": "model.embed_tokens",
    "gpt_neox.layers.*.input_layernorm": "model.layers.*.attention_norm",
    "gpt_neox.layers.*.attention.query_key_value": "model.layers.*.attention.qkv",
    "gpt_neox.layers.*.attention.dense": "model.layers.*.attention.output",
    "gpt_neox.layers.*.post_attention_layernorm": "model.layers.*.feed_forward_norm",
    "gpt_neox.layers.*.mlp.dense_h_to_4h": "model.layers.*.feed_forward.input",
    "gpt_neox.layers.*.mlp.dense_4h_to_h": "model.layers.*.feed_forward.output",
    "gpt_neox.final_layer_norm": "model.final_norm",
    "lm_head": "lm_head",
}


def from_transformers(model: PreTrainedModel) -> NormFreeForCausalLM:
    """The same function as a NormFreeForCausalLM: copied weights, same dtype, device and mode.

    Raises ValueError for a model that is neither GPT2LMHeadModel nor GPTNeoXForCausalLM, for features and weights that
    NormFreeConfig has no field for, and for weights of several dtypes.
    """
    if isinstance(model, GPT2LMHeadModel):
        fields, modules = _gpt2_fields(model.config), GPT2_NAMES
    elif isinstance(model, GPTNeoXForCausalLM):
        fields, modules = _neox_fields(model.config), NEOX_NAMES
    else:
        raise ValueError(f"cannot convert {type(model).__name__}; give a GPT2LMHeadModel or a GPTNeoXForCausalLM")
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    names += ("max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    shared = {name: getattr(model.config, name) for name in names}
    config = NormFreeConfig(**shared, **fields, bias="all")
    with torch.device(model.device):
        ours = NormFreeForCausalLM._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    weights, expected = {}, ours.state_dict().keys()
    for name, weight in model.state_dict().items():
        module, _, part = name.rpartition(".")
        number = "".join(re.findall(r"\.(\d+)\.", module))
        our_module = modules.get(re.sub(r"\.\d+\.", ".*.", module), "").replace("*", number)
        if f"{our_module}.{part}" not in expected:
            raise ValueError(f"cannot convert {name}: a NormFreeForCausalLM has no place for it")
        weights[f"{our_module}.{part}"] = _converted(module, weight, model.config.num_attention_heads)
    if len(dtypes := {weight.dtype for weight in weights.values()}) > 1:
        raise ValueError(f"cannot convert weights of several dtypes ({', '.join(sorted(map(str, dtypes)))}): cast them")
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    apart = embedding.data_ptr() != head.data_ptr() and not torch.equal(embedding, head)
    if model.config.tie_word_embeddings and apart:
        raise ValueError("cannot convert tie_word_embeddings=True with an lm_head of other weights: set it to False")
    ours.load_state_dict(weights)
    ours.generation_config = copy.deepcopy(model.generation_config)
    return ours.train(model.training)


def _converted(module: str, weight: Tensor, heads: int) -> Tensor:
    """Our layout of a weight or bias."""
    if module.endswith((".c_attn", ".c_proj", ".c_fc")):
        return weight.t()  # GPT-2 stores (input, output); a bias stays as it is
    if module.endswith(".query_key_value"):  # rows from (H, 3, D), by head, to (3, H, D): all queries first
        return weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return weight


def _gpt2_fields(config: GPT2Config) -> dict[str, Any]:
    _refuse(config, "scale_attn_weights", False)
    _refuse(config, "scale_attn_by_inverse_layer_idx", True)
    _refuse(config, "add_cross_attention", True)
    return {
        "intermediate_size": config.n_inner,
        "position": "learned",
        "residual": "sequential",
        "activation": _activation(config.activation_function),
        "norm_epsilon": config.layer_norm_epsilon,
        "embedding_dropout": config.embd_pdrop,
        "attention_dropout": config.attn_pdrop,
        "residual_dropout": config.resid_pdrop,
    }


def _neox_fields(config: GPTNeoXConfig) -> dict[str, Any]:
    _refuse(config, "attention_bias", False)
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    if rope["rope_type"] != "default":
        raise ValueError(f"cannot convert rope_type={rope['rope_type']!r}; only 'default' can be converted")
    head_dim = config.hidden_size // config.num_attention_heads
    return {
        "intermediate_size": config.intermediate_size,
        "position": "rotary",
        # GPT-NeoX rounds the number of rotating dimensions down.
        "rotary_share": int(head_dim * rope["partial_rotary_factor"]) / head_dim,
        "rotary_base": rope["rope_theta"],
        "residual": "parallel" if config.use_parallel_residual else "sequential",
        "activation": _activation(config.hidden_act),
        "norm_epsilon": config.layer_norm_eps,
        "embedding_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "residual_dropout": config.hidden_dropout,
    }


def _activation(name: str) -> str:
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"cannot convert activation {name!r}; allowed: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def _refuse(config: GPT2Config | GPTNeoXConfig, name: str, value: bool) -> None:
    if getattr(config, name) == value:
        raise ValueError(f"cannot convert {name}={value}: NormFreeConfig has no field for it")
