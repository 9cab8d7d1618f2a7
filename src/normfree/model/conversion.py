"""Models of transformers as our architecture: fields of the config, names and layout of weights."""

# H heads, D head dim

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig

from .configuration import NormFreeConfig, NormFreeSeq2SeqConfig, NormFreeVisionConfig
from .folding import fold_norms
from .modeling import NormFreeForCausalLM, NormFreePreTrainedModel
from .seq2seq import NormFreeForSeq2SeqLM
from .vision import NormFreeForImageClassification

Head = TypeVar("Head", bound=NormFreePreTrainedModel)

NORM_FREE_EPSILON = 1e6
"""From this epsilon on a LayerNorm divides by sqrt(epsilon) whatever its input is: "LayerNorm-free" models."""

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_ACTIVATIONS |= {"leaky_relu": "leaky_relu", "linear": "identity"}
_NAMES = {  # parts of names of modules, in all families
    r"^(transformer|gpt_neox|vit)\.": "model.",
    r"embeddings\.cls_token": "embed_tokens.class_token",
    r"embeddings\.position_embeddings": "positions.vectors.weight",
    r"embeddings\.patch_embeddings": "embed_tokens",
    r"\.h\.": ".layers.",
    r"wte|embed_in": "embed_tokens",
    r"wpe": "positions.vectors",
    r"ln_1|input_layernorm|layernorm_before": "attention_norm",
    r"ln_2|post_attention_layernorm|layernorm_after": "feed_forward_norm",
    r"ln_f|final_layer_norm|(?<=^model\.)layernorm": "final_norm",
    r"attn\.c_attn|attention\.query_key_value": "attention.qkv",
    r"attn\.c_proj|attention\.dense|attention\.o_proj": "attention.output",
    r"mlp\.(c_fc|dense_h_to_4h|fc1)": "feed_forward.input",
    r"mlp\.(c_proj|dense_4h_to_h|fc2)": "feed_forward.output",
    r"^embed_out": "lm_head",
}
_T5_NAMES = {
    r"^shared": "model.encoder.embed_tokens",
    r"^(encoder|decoder)\.block": r"model.\1.layers",
    r"^(encoder|decoder)\.final_layer_norm": r"model.\1.final_norm",
    r"layers\.0\.layer\.0\.SelfAttention\.relative_attention_bias": "positions.values",
    r"layer\.0\.SelfAttention": "attention",
    r"layer\.1\.EncDecAttention": "cross_attention",
    r"attention\.o\.": "attention.output.",
    r"layer\.0\.layer_norm": "attention_norm",
    r"(?<=^model\.decoder\.layers\.)(\d+)\.layer\.1\.layer_norm": r"\1.cross_norm",
    r"layer\.[12]\.layer_norm": "feed_forward_norm",
    r"layer\.[12]\.DenseReluDense\.wi(_0)?\.": "feed_forward.input.",
    r"layer\.[12]\.DenseReluDense\.wi_1": "feed_forward.gate",
    r"layer\.[12]\.DenseReluDense\.wo": "feed_forward.output",
}
_OWN_TYPES = tuple(kind.model_type for kind in (NormFreeConfig, NormFreeVisionConfig, NormFreeSeq2SeqConfig))


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of NormFreeConfig for the content of a config.json.

    Raises ValueError for a model that is not ours, GPT-2, GPT-NeoX, ViT or T5, and what these have and we have not.
    """
    readers = {"gpt2": _gpt2, "gpt_neox": _gpt_neox, "vit": _vit, "t5": _t5}
    if (kind := config.get("model_type")) in _OWN_TYPES:
        fields = _normfree(config)
    elif kind in readers:
        fields = readers[kind](AutoConfig.for_model(**config))
    else:
        raise ValueError(f"a model of type {kind!r}; allowed: {', '.join((*_OWN_TYPES, *readers))}")
    if fields.get("norm_epsilon", 0.0) >= NORM_FREE_EPSILON:
        del fields["norm_epsilon"]
        fields |= {"norm": "none", "final_norm": "none", "tie_word_embeddings": False, "output_bias": True}
    return fields


def _normfree(config: Mapping[str, Any]) -> dict[str, Any]:
    default = NormFreeConfig()
    own = {name: config[name] for name in NormFreeConfig.__annotations__ if name in config and name != "target_tokens"}
    fields = {name: value for name, value in own.items() if value != getattr(default, name, None)}
    return {"norm": config["norm"], "activation": config["activation"], **fields}


def _same(theirs: Any, *more: str) -> dict[str, Any]:
    """Fields that have our names in every config of transformers, and `more`."""
    return {name: getattr(theirs, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", *more)}


def _gpt2(gpt2: Any) -> dict[str, Any]:
    if not gpt2.scale_attn_weights or gpt2.scale_attn_by_inverse_layer_idx:
        raise ValueError("a GPT-2 that scales its attention in another way")
    return {
        **_same(gpt2, "vocab_size", "tie_word_embeddings"),
        "intermediate_size": gpt2.n_inner or 4 * gpt2.n_embd,
        "activation": _activation(gpt2.activation_function),
        "norm": "layernorm",
        "norm_epsilon": gpt2.layer_norm_epsilon,
        "bias": "all",
    }


def _gpt_neox(neox: Any) -> dict[str, Any]:
    rotary: Mapping[str, Any] = neox.rope_parameters
    if rotary.get("rope_type", "default") != "default" or not neox.attention_bias:
        raise ValueError("a GPT-NeoX with scaled rotary positions or attention without bias")
    return {
        **_same(neox, "vocab_size", "tie_word_embeddings", "intermediate_size"),
        "activation": _activation(neox.hidden_act),
        "norm": "layernorm",
        "norm_epsilon": neox.layer_norm_eps,
        "residual": "parallel" if neox.use_parallel_residual else "sequential",
        "position": "rotary",
        "rotary_share": rotary.get("partial_rotary_factor", 1.0),
        "rotary_base": float(rotary["rope_theta"]),
        "bias": "all",
    }


def _vit(vit: Any) -> dict[str, Any]:
    if not vit.qkv_bias:
        raise ValueError("a ViT without biases of queries, keys and values")
    own = {"family": "vision", "activation": _activation(vit.hidden_act), "norm": "layernorm", "bias": "all"}
    same = _same(vit, "intermediate_size", "image_size", "patch_size", "num_channels")
    return own | {"norm_epsilon": vit.layer_norm_eps} | same


def _t5(t5: Any) -> dict[str, Any]:
    if t5.num_decoder_layers != t5.num_layers or t5.d_kv * t5.num_heads != t5.d_model:
        raise ValueError("a T5 whose stacks differ in depth, or whose heads together are not as wide as the model")
    start = getattr(t5, "decoder_start_token_id", None)
    return {
        **{"family": "encoder_decoder", "position": "relative", "norm": "rmsnorm", "final_norm": "rmsnorm"},
        **_same(t5, "vocab_size", "eos_token_id"),
        "intermediate_size": t5.d_ff,
        "max_position_embeddings": getattr(t5, "n_positions", 512),
        "relative_buckets": t5.relative_attention_num_buckets,
        "relative_distance": t5.relative_attention_max_distance,
        "norm_epsilon": t5.layer_norm_epsilon,
        "activation": _activation(t5.dense_act_fn),
        "feed_forward": "gated" if t5.is_gated_act else "plain",
        "bias": "none",
        "tie_word_embeddings": t5.scale_decoder_outputs,  # false in T5 v1.1
        "decoder_start_token_id": t5.pad_token_id if start is None else start,
    }


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r}; allowed: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def convert(theirs: Any) -> NormFreePreTrainedModel:
    """Our model with the weights of a GPT-2, GPT-NeoX, T5 or a ViT classifier, in evaluation mode: the same logits.

    LayerNorms with an epsilon of `NORM_FREE_EPSILON` or more divide by sqrt(epsilon) whatever their input is; they are
    folded, so that the model has no norm. Raises ValueError as `fields_of` does.
    """
    config: dict[str, Any] = theirs.config.to_dict()
    fields = fields_of(config)
    if fields.get("family") == "vision":
        vision = NormFreeVisionConfig(**fields, id2label=theirs.config.id2label, label2id=theirs.config.label2id)
        return _loaded(NormFreeForImageClassification, vision, _converted_vit_weights(theirs.state_dict()))
    if fields.get("family") == "encoder_decoder":
        seq2seq = NormFreeSeq2SeqConfig(**fields)
        return _loaded(NormFreeForSeq2SeqLM, seq2seq, _converted_t5_weights(theirs.state_dict(), seq2seq))
    fields |= {"max_position_embeddings": theirs.config.max_position_embeddings}
    weights = _converted_weights(theirs.state_dict(), theirs.config.num_attention_heads)
    if not fields.get("output_bias"):
        return _loaded(NormFreeForCausalLM, NormFreeConfig(**fields), weights)
    epsilon = float(config["layer_norm_epsilon" if "layer_norm_epsilon" in config else "layer_norm_eps"])
    fields |= {"norm": "fake", "final_norm": "fake", "fake_start_step": 1, "output_bias": False}
    fields["tie_word_embeddings"] = theirs.config.tie_word_embeddings
    model = _loaded(NormFreeForCausalLM, NormFreeConfig(**fields), weights)
    for name, buffer in model.named_buffers():  # all of FakeLayerNorms
        buffer.fill_(1.0 if name.endswith("is_fixed") else epsilon**0.5)
    return fold_norms(model)


def _loaded(kind: type[Head], config: NormFreeConfig, weights: Mapping[str, Tensor]) -> Head:
    with torch.random.fork_rng(devices=[]):
        model = kind._from_config(config)
    model.load_state_dict({**dict(model.named_buffers()), **weights})
    return model.eval()


def _converted_vit_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = _converted_weights(_with_joined_qkv(weights, "_proj"), heads=1)
    for name, shape in (("class_token", (-1,)), ("projection.weight", (len(weights["classifier.weight"].T), -1))):
        converted[f"model.embed_tokens.{name}"] = converted[f"model.embed_tokens.{name}"].reshape(shape)
    converted["model.positions.vectors.weight"] = converted["model.positions.vectors.weight"][0]
    return converted


def _converted_t5_weights(weights: Mapping[str, Tensor], config: NormFreeSeq2SeqConfig) -> dict[str, Tensor]:
    """T5 scales the logits of tied embeddings in place of its scores: a final norm and the queries take that over."""
    scaled = {name: value for name, value in weights.items() if "coder.embed_tokens" not in name}
    for name in [name for name in scaled if name.endswith("Attention.q.weight")]:
        scaled[name] = scaled[name] * config.head_dim**0.5
    if config.tie_word_embeddings:
        final = "decoder.final_layer_norm.weight"
        scaled[final] = weights[final] * config.hidden_size**-0.5
    return {_renamed(name, _T5_NAMES): weight for name, weight in _with_joined_qkv(scaled, "").items()}


def _with_joined_qkv(weights: Mapping[str, Tensor], ending: str) -> dict[str, Tensor]:
    joined = dict(weights)
    for name in [name for name in weights if f".q{ending}." in name]:
        parts = [joined.pop(name.replace(f".q{ending}.", f".{part}{ending}.")) for part in "qkv"]
        joined[name.replace(f".q{ending}.", ".qkv.")] = torch.cat(parts)
    return joined


def _converted_weights(weights: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The weights under our names, in our layout."""
    converted = {}
    for name, weight in weights.items():
        if re.search(r"\.c_(attn|proj|fc)\.weight$", name):
            weight = weight.t()  # GPT-2 stores (input, output)
        if "query_key_value" in name:  # rows from (H, 3, D), by head, to (3, H, D): all queries first
            weight = weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        converted[_renamed(name, _NAMES)] = weight
    return converted


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for theirs, ours in names.items():
        name = re.sub(theirs, ours, name)
    return name
