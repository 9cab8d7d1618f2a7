"""Weights of transformers' GPT-2 and GPT-NeoX (Pythia) models as a NormFreeForCausalLM.

What our architecture cannot express is refused by name; nothing is dropped in silence.
"""

# E hidden size, H heads, D head dim

from __future__ import annotations

import copy
from collections.abc import Callable
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


def from_transformers(model: PreTrainedModel) -> NormFreeForCausalLM:
    """The same function as a NormFreeForCausalLM: copied weights, same dtype, device and mode.

    Raises ValueError for a model that is neither GPT2LMHeadModel nor GPTNeoXForCausalLM, for features and weights of
    theirs that NormFreeConfig has no field for, and for weights of several dtypes.
    """
    for kind, (read_config, read_weights) in _READERS.items():
        if isinstance(model, kind):
            left = model.state_dict()
            fields, weights = read_config(model.config), read_weights(model, left)
            break
    else:
        allowed = " and ".join(kind.__name__ for kind in _READERS)
        raise ValueError(f"cannot convert {type(model).__name__}; {allowed} can be converted")
    if left:
        raise ValueError(f"cannot convert {', '.join(left)}: a NormFreeForCausalLM has no place for them")
    if len(dtypes := {weight.dtype for weight in weights.values()}) > 1:
        raise ValueError(f"cannot convert weights of several dtypes ({', '.join(sorted(map(str, dtypes)))}): cast them")
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    apart = embedding.data_ptr() != head.data_ptr() and not torch.equal(embedding, head)
    if model.config.tie_word_embeddings and apart:
        raise ValueError("cannot convert tie_word_embeddings=True with an lm_head of other weights: set it to False")
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    names += ("max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    shared = {name: getattr(model.config, name) for name in names}
    config = NormFreeConfig(**shared, **fields, bias="all")
    with torch.device(model.device):
        ours = NormFreeForCausalLM._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    ours.load_state_dict(weights)
    ours.generation_config = copy.deepcopy(model.generation_config)
    return ours.train(model.training)


def _read_gpt2_config(config: GPT2Config) -> dict[str, Any]:
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


def _read_gpt2_weights(model: GPT2LMHeadModel, source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes what it reads out of `source`."""
    weights = {
        "model.embed_tokens.weight": source.pop("transformer.wte.weight"),
        "model.positions.vectors.weight": source.pop("transformer.wpe.weight"),
        "lm_head.weight": source.pop("lm_head.weight"),
        **_both("model.final_norm", source, "transformer.ln_f"),
    }
    for layer in range(model.config.n_layer):
        ours, theirs = f"model.layers.{layer}", f"transformer.h.{layer}"
        weights |= _both(f"{ours}.attention_norm", source, f"{theirs}.ln_1")
        weights |= _both(f"{ours}.feed_forward_norm", source, f"{theirs}.ln_2")
        # GPT-2 stores these as (input, output).
        for name, other in (
            ("attention.qkv", "attn.c_attn"),
            ("attention.output", "attn.c_proj"),
            ("feed_forward.input", "mlp.c_fc"),
            ("feed_forward.output", "mlp.c_proj"),
        ):
            weights |= _both(f"{ours}.{name}", source, f"{theirs}.{other}", transform=lambda tensor: tensor.t())
    return weights


def _read_neox_config(config: GPTNeoXConfig) -> dict[str, Any]:
    _refuse(config, "attention_bias", False)
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    if rope["rope_type"] != "default":
        raise ValueError(f"cannot convert rope_type={rope['rope_type']!r}; only 'default' can be converted")
    head_dim = config.hidden_size // config.num_attention_heads
    return {
        "intermediate_size": config.intermediate_size,
        "position": "rotary",
        # Theirs rounds the number of rotating dimensions down.
        "rotary_share": int(head_dim * rope["partial_rotary_factor"]) / head_dim,
        "rotary_base": rope["rope_theta"],
        "residual": "parallel" if config.use_parallel_residual else "sequential",
        "activation": _activation(config.hidden_act),
        "norm_epsilon": config.layer_norm_eps,
        "embedding_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "residual_dropout": config.hidden_dropout,
    }


def _read_neox_weights(model: GPTNeoXForCausalLM, source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes what it reads out of `source`."""
    heads = model.config.num_attention_heads

    def by_kind(tensor: Tensor) -> Tensor:
        """Rows from (H, 3, D), a head's query, key and value together, to (3, H, D): all queries first."""
        return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    weights = {
        "model.embed_tokens.weight": source.pop("gpt_neox.embed_in.weight"),
        "lm_head.weight": source.pop("lm_head.weight"),
        **_both("model.final_norm", source, "gpt_neox.final_layer_norm"),
    }
    for layer in range(model.config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"gpt_neox.layers.{layer}"
        weights |= _both(f"{ours}.attention.qkv", source, f"{theirs}.attention.query_key_value", transform=by_kind)
        for name, other in (
            ("attention_norm", "input_layernorm"),
            ("feed_forward_norm", "post_attention_layernorm"),
            ("attention.output", "attention.dense"),
            ("feed_forward.input", "mlp.dense_h_to_4h"),
            ("feed_forward.output", "mlp.dense_4h_to_h"),
        ):
            weights |= _both(f"{ours}.{name}", source, f"{theirs}.{other}")
    return weights


_READERS: dict[type[PreTrainedModel], tuple[Callable[[Any], dict[str, Any]], Callable[..., dict[str, Tensor]]]] = {
    GPT2LMHeadModel: (_read_gpt2_config, _read_gpt2_weights),
    GPTNeoXForCausalLM: (_read_neox_config, _read_neox_weights),
}


def _both(
    ours: str, source: dict[str, Tensor], theirs: str, *, transform: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Weight and bias of one module under our name; `transform` applies to both."""
    tensors = {f"{ours}.{part}": source.pop(f"{theirs}.{part}") for part in ("weight", "bias")}
    return {name: transform(tensor) for name, tensor in tensors.items()} if transform else tensors


def _activation(name: str) -> str:
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"cannot convert activation {name!r}; allowed: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def _refuse(config: GPT2Config | GPTNeoXConfig, name: str, value: bool) -> None:
    if getattr(config, name) == value:
        raise ValueError(f"cannot convert {name}={value}: NormFreeConfig has no field for it")
