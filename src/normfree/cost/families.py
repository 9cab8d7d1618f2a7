"""From a model's config to the sizes that decide its cost, one reader per family; nothing here needs torch.

A reader names the operations of the model. It prices nothing, so that an operation without a constant is refused
where the constants are (`constants.py`), by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from normfree.spec.keys import nearest


class NoPriceError(ValueError):
    """An operation that nobody has measured: it is not free, so nothing is said about its model."""


class HasToDict(Protocol):
    """A config object of transformers."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a decoder-only model. Norms and activations are names of operations; an empty tuple does nothing."""

    family: str
    vocab_size: int
    width: int
    query_heads: int
    key_heads: int
    head_dim: int
    rotary_dim: int
    """Dimensions of a head that rotate; 0 without rotary positions."""
    feed_forward: int
    gated: bool
    """The feed-forward part multiplies its activation by a second projection (Llama)."""
    norm: tuple[str, ...]
    """Before attention and before the feed-forward part."""
    final_norm: tuple[str, ...]
    activations: tuple[tuple[str, ...], ...]
    """Operations of each layer's activation, per element."""
    max_tokens: int

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "layers", "width", "query_heads", "key_heads", "head_dim", "feed_forward", "max_tokens")
        for name in sizes:
            if not getattr(self, name) >= 1:
                raise ValueError(f"the config of this {self.family} model gives {name}={getattr(self, name)}")
        if not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"{self.rotary_dim} of {self.head_dim} dimensions of a head rotate: not a share of them")

    @property
    def layers(self) -> int:
        return len(self.activations)


# A name in a config to the operations it runs on every element.
TRANSFORMERS_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "gelu": ("gelu_erf",),
    "gelu_new": ("gelu_tanh",),
    "gelu_pytorch_tanh": ("gelu_tanh",),
    "relu": ("relu",),
    "silu": ("silu",),
    "swish": ("silu",),
}
NORMFREE_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "gelu": ("gelu_erf",),
    "gelu_tanh": ("gelu_tanh",),
    "relu": ("relu",),
    "identity": (),
}
# slope * (x - relu(x)) + relu(x): one product, with a public number or with a secret one (a weight of the model).
LEAKY_RELU = {
    "none": ("relu", "public_product"),
    "per_layer": ("relu", "product"),
    "shared": ("relu", "product"),
}
NORMFREE_NORMS: dict[str, tuple[str, ...]] = {"layernorm": ("layernorm",), "none": ()}

# What a run's spec leaves out; a test holds these against NormFreeConfig.
NORMFREE_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": None,
    "max_position_embeddings": 128,
    "position": "learned",
    "rotary_share": 0.25,
    "norm": "layernorm",
    "final_norm": "layernorm",
    "activation": "gelu",
    "learnable_slope": "none",
}


def read_architecture(config: HasToDict | Mapping[str, Any]) -> Architecture:
    """The sizes in a config of transformers, or in the content of a config.json.

    Raises ValueError for a family that no reader knows and for a field that is missing.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    family = values.get("model_type")
    if family not in READERS:
        raise ValueError(f"no cost for models of type {family!r}; {nearest(str(family), list(READERS))}")
    try:
        return READERS[family](values)
    except KeyError as error:
        raise ValueError(f"the config of this {family} model has no field {error.args[0]!r}") from None


def _normfree(values: Mapping[str, Any]) -> Architecture:
    values = {**NORMFREE_DEFAULTS, **values}
    layers, width, heads = values["num_hidden_layers"], values["hidden_size"], values["num_attention_heads"]
    several = isinstance(values["activation"], (list, tuple))
    names = values["activation"] if several else [values["activation"]] * layers
    if len(names) != layers:
        raise ValueError(f"activation lists {len(names)} names, but num_hidden_layers is {layers}")
    head_dim = _head_dim(values, width="hidden_size", heads="num_attention_heads")
    if values["position"] not in ("learned", "rotary"):
        raise ValueError(f"position={values['position']!r}: allowed are learned and rotary")
    known = {
        **NORMFREE_ACTIVATIONS,
        "leaky_relu": _operations(LEAKY_RELU, "learnable_slope", values["learnable_slope"]),
    }
    rotary = values["position"] == "rotary"
    return Architecture(
        family="normfree",
        vocab_size=values["vocab_size"],
        width=width,
        query_heads=heads,
        key_heads=heads,
        head_dim=head_dim,
        rotary_dim=round(head_dim * values["rotary_share"]) if rotary else 0,
        feed_forward=values["intermediate_size"] or 4 * width,
        gated=False,
        norm=_operations(NORMFREE_NORMS, "norm", values["norm"]),
        final_norm=_operations(NORMFREE_NORMS, "final_norm", values["final_norm"]),
        activations=tuple(_operations(known, "activation", name) for name in names),
        max_tokens=values["max_position_embeddings"],
    )


def _gpt2(values: Mapping[str, Any]) -> Architecture:
    if values.get("add_cross_attention"):
        raise NoPriceError(
            "add_cross_attention=True has no known cost, and nothing counts as free; use add_cross_attention=False"
        )
    width, heads = values["n_embd"], values["n_head"]
    activation = values["activation_function"]
    return Architecture(
        family="gpt2",
        vocab_size=values["vocab_size"],
        width=width,
        query_heads=heads,
        key_heads=heads,
        head_dim=_head_dim(values, width="n_embd", heads="n_head"),
        rotary_dim=0,
        feed_forward=values.get("n_inner") or 4 * width,
        gated=False,
        norm=("layernorm",),
        final_norm=("layernorm",),
        activations=(_operations(TRANSFORMERS_ACTIVATIONS, "activation_function", activation),) * values["n_layer"],
        max_tokens=values["n_positions"],
    )


def _gpt_neox(values: Mapping[str, Any]) -> Architecture:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = _head_dim(values, width="hidden_size", heads="num_attention_heads")
    # transformers 4 wrote rotary_pct, transformers 5 writes rope_parameters.
    share = (values.get("rope_parameters") or {}).get("partial_rotary_factor")
    share = values["rotary_pct"] if share is None else share
    activation = _operations(TRANSFORMERS_ACTIVATIONS, "hidden_act", values["hidden_act"])
    return Architecture(
        family="gpt_neox",
        vocab_size=values["vocab_size"],
        width=width,
        query_heads=heads,
        key_heads=heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * share),  # as transformers rounds it
        feed_forward=values["intermediate_size"],
        gated=False,
        norm=("layernorm",),
        final_norm=("layernorm",),
        activations=(activation,) * values["num_hidden_layers"],
        max_tokens=values["max_position_embeddings"],
    )


def _llama(values: Mapping[str, Any]) -> Architecture:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values.get("head_dim") or _head_dim(values, width="hidden_size", heads="num_attention_heads")
    activation = _operations(TRANSFORMERS_ACTIVATIONS, "hidden_act", values["hidden_act"])
    return Architecture(
        family="llama",
        vocab_size=values["vocab_size"],
        width=width,
        query_heads=heads,
        key_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
        feed_forward=values["intermediate_size"],
        gated=True,
        norm=("rmsnorm",),
        final_norm=("rmsnorm",),
        activations=(activation,) * values["num_hidden_layers"],
        max_tokens=values["max_position_embeddings"],
    )


def _head_dim(values: Mapping[str, Any], *, width: str, heads: str) -> int:
    if values[heads] < 1 or values[width] % values[heads]:
        raise ValueError(f"{width}={values[width]} must be a multiple of {heads}={values[heads]}")
    return values[width] // values[heads]


def _operations(known: Mapping[str, tuple[str, ...]], field: str, name: str) -> tuple[str, ...]:
    if name not in known:
        raise NoPriceError(
            f"{field}={name!r} has no known cost, and nothing counts as free; {nearest(name, list(known))}"
        )
    return known[name]


READERS: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    "normfree": _normfree,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
}
