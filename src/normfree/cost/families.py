"""The sizes and operations of a model that decide its cost, from its config; one reader per family. No torch needed."""

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normfree.spec.keys import fields_of_model, nearest

SHAPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_bytes())["configs"]
"""Published configs by short name, which need no network."""


class NoPriceError(ValueError):
    """An operation without a measured price, so that the cost of its model is unknown."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a decoder-only model. Norms and activations are names of operations; an empty tuple means none."""

    family: str
    vocab_size: int
    width: int
    query_heads: int
    key_heads: int
    head_dim: int
    rotary_dim: int  # rotated dimensions of a head; 0 without rotary positions
    feed_forward: int
    norm: tuple[str, ...]  # before attention and before the feed-forward part
    final_norm: tuple[str, ...]
    activations: tuple[tuple[str, ...], ...]  # operations of each layer's activation, per element
    max_tokens: int
    gated: bool = False  # the feed-forward part multiplies its activation by a second projection (Llama)
    post_norm: tuple[str, ...] = ()  # after attention and after the feed-forward part, before the sum (Gemma 2)
    query_key_norm: tuple[str, ...] = ()  # on the queries and keys of each head
    scores_cap: tuple[str, ...] = ()  # soft-capping of the attention scores
    logits_cap: tuple[str, ...] = ()  # soft-capping of the logits

    @property
    def layers(self) -> int:
        return len(self.activations)


# Operations on every element, by the name of an activation in a config of ours or of transformers.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "gelu": ("gelu_erf",),
    **dict.fromkeys(("gelu_tanh", "gelu_new", "gelu_pytorch_tanh"), ("gelu_tanh",)),
    "relu": ("relu",),
    **dict.fromkeys(("silu", "swish"), ("silu",)),
    "identity": (),
}
GPT2_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
GPT2_NAMES |= {"n_inner": "intermediate_size", "n_positions": "max_position_embeddings"}
GPT2_NAMES |= {"activation_function": "hidden_act"}
# slope * (x - relu(x)) + relu(x): one product, with a public number or with a secret one (a weight of the model).
LEAKY_RELU = {"none": ("relu", "public_product"), "per_layer": ("relu", "product"), "shared": ("relu", "product")}
# cap * tanh(x / cap) is cap * (2 sigmoid(2x / cap) - 1). SiLU is a sigmoid and a product, so its price covers that.
SOFT_CAP = ("silu",)
# DyT multiplies by a secret steepness, then takes tanh; gain and offset fold into the next matrix. GELU covers erf.
NORMFREE_NORMS: dict[str, tuple[str, ...]] = {
    "layernorm": ("layernorm",),
    "rmsnorm": ("rmsnorm",),
    "lns": ("layernorm",),
    "dyt": ("product", *SOFT_CAP),
    "derf": ("product", "gelu_erf"),
    "bhyt": ("rmsnorm", *SOFT_CAP),
    "none": (),
}
# Choices that fold into matrices, move a norm or are counted (rotary positions); others are refused by name.
NORMFREE_FREE = {
    "family": ("decoder",),
    "position": ("learned", "rotary"),
    "placement": ("pre", "post", "mix", "peri"),
    "branch": ("plain", "fixed", "layerscale", "rezero"),
    "linear": ("plain", "weight_norm", "spectral_norm"),
    "embedding_scale": ("none", "learned"),
    "attention_temperature": ("fixed", "head"),
    "attention_sink": ("none",),
    "attention_gate": ("none",),
}

NORM_FREE_EPSILON = 1e6  # as in normfree.model.conversion (a test compares them)

NORMFREE_DEFAULTS: dict[str, Any] = {name: ast.literal_eval(default) for name, _, default, _ in fields_of_model()}


def read_architecture(config: Any) -> Architecture:
    """The sizes in a transformers config object, or in the content of a config.json. Raises ValueError for others."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    family = values.get("model_type")
    if family not in READERS:
        raise ValueError(f"no cost for models of type {family!r}; {nearest(str(family), list(READERS))}")
    try:
        return READERS[family](values)
    except KeyError as error:
        raise ValueError(f"the config of this {family} model has no field {error}") from None


def _normfree(values: Mapping[str, Any]) -> Architecture:
    values = {**NORMFREE_DEFAULTS, **values}
    known = ACTIVATIONS | {"leaky_relu": _operations(LEAKY_RELU, "learnable_slope", values["learnable_slope"])}
    for name, free in NORMFREE_FREE.items():
        if values[name] not in free:
            raise NoPriceError(f"{name}={values[name]!r} has no known cost; only {name}={' or '.join(free)} is priced")
    names = ("norm", "final_norm", "query_key_norm")
    norms: dict[str, Any] = {name: _operations(NORMFREE_NORMS, name, values[name]) for name in names}
    if values["placement"] == "peri":
        norms["post_norm"] = norms["norm"]
    gated = values["feed_forward"] == "gated"
    model = _decoder(values, activation="activation", known=known, gated=gated, **norms)
    rotary_share = values["rotary_share"] if values["position"] == "rotary" else 0
    return replace(model, rotary_dim=round(model.head_dim * rotary_share))


def _gpt2(values: Mapping[str, Any]) -> Architecture:
    if values.get("add_cross_attention"):
        raise NoPriceError("add_cross_attention=True has no known cost; use add_cross_attention=False")
    values = {GPT2_NAMES.get(name, name): value for name, value in values.items()}
    norm = _layer_norm(values.get("layer_norm_epsilon", 1e-5))
    return _decoder({"intermediate_size": None, **values}, norm=norm, final_norm=norm)


def _gpt_neox(values: Mapping[str, Any]) -> Architecture:
    # transformers 4 wrote rotary_pct, transformers 5 writes rope_parameters.
    share = (values.get("rope_parameters") or {}).get("partial_rotary_factor")
    share = values["rotary_pct"] if share is None else share
    norm = _layer_norm(values.get("layer_norm_eps", 1e-5))
    return _decoder(values, rotary_share=share, norm=norm, final_norm=norm)


def _layer_norm(epsilon: float) -> tuple[str, ...]:
    """Nothing for a huge epsilon: such a LayerNorm divides by sqrt(epsilon) whatever its input is, so it folds."""
    return () if epsilon >= NORM_FREE_EPSILON else ("layernorm",)


def _llama(values: Mapping[str, Any]) -> Architecture:
    return _decoder(values, rotary_share=1, gated=True, norm=("rmsnorm",), final_norm=("rmsnorm",))


def _gemma2(values: Mapping[str, Any]) -> Architecture:
    """Llama with norms on both sides of each part, and with soft-capping."""
    llama = _llama({**values, "hidden_act": values["hidden_activation"]})  # Gemma 2 does not read hidden_act
    scores, logits = (SOFT_CAP if values[f"{name}_logit_softcapping"] else () for name in ("attn", "final"))
    return replace(llama, post_norm=("rmsnorm",), scores_cap=scores, logits_cap=logits)


def _decoder(
    values: Mapping[str, Any],
    *,
    activation: str = "hidden_act",
    known: Mapping[str, tuple[str, ...]] = ACTIVATIONS,
    rotary_share: float = 0,
    **parts: Any,
) -> Architecture:
    """The sizes, under the names that most configs give them; `activation` lists one operation, or one a layer."""
    layers, width, heads = (values[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    if not values.get("head_dim") and (heads < 1 or width % heads):
        raise ValueError(f"hidden_size={width} must be a multiple of num_attention_heads={heads}")
    head_dim = values.get("head_dim") or width // heads
    names = [values[activation]] * layers if isinstance(values[activation], str) else values[activation]
    if len(names) != layers:
        raise ValueError(f"{activation} lists {len(names)} names, but num_hidden_layers is {layers}")
    return Architecture(
        family=values["model_type"],
        vocab_size=values["vocab_size"],
        width=width,
        query_heads=heads,
        key_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * rotary_share),  # as transformers rounds it
        feed_forward=values["intermediate_size"] or 4 * width,
        activations=tuple(_operations(known, "activation", name) for name in names),
        max_tokens=values["max_position_embeddings"],
        **parts,
    )


def _operations(known: Mapping[str, tuple[str, ...]], field: str, name: str) -> tuple[str, ...]:
    if name not in known:
        hint = nearest(name, list(known)).replace("allowed:", "with a known cost:")
        raise NoPriceError(f"{field}={name!r} has no known cost; {hint}")
    return known[name]


READERS: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    **{"normfree": _normfree, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "gemma2": _gemma2},
    **dict.fromkeys(("llama", "mistral", "qwen2"), _llama),  # sliding windows change the public mask: they save nothing
}
