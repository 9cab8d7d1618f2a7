"""NormFreeConfig: every choice of architecture is one field; the defaults are the paper's GPT-2 baseline.

No `from __future__ import annotations` here: the fields' types are checked when a config is built.
"""

import math
from dataclasses import Field, fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedConfig

from .activations import ACTIVATIONS
from .norms import NORMS

# Keys that transformers itself writes to config.json or passes on, beside the fields of PreTrainedConfig
# and everything that starts with an underscore.
TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "tie_last_hidden_states",
    "torch_dtype",
}


class NormFreeConfig(PreTrainedConfig):
    """Architecture of a decoder-only language model with or without normalization.

    Raises ValueError for an unknown key, a value of the wrong type or outside its range, and fields that
    contradict each other.
    """

    model_type = "normfree"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    """Tokens in the vocabulary; left out of a run, its tokenizer's."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Blocks of attention and feed-forward."""
    num_attention_heads: int = 12
    """Heads of a block, each hidden_size / num_attention_heads wide."""
    intermediate_size: int | None = None
    """Width of the feed-forward part; empty means 4 * hidden_size."""
    max_position_embeddings: int = 128
    """Longest sequence in tokens; left out of a run, data.context."""
    position: Literal["learned", "rotary"] = "learned"
    """A learned vector per position, or rotated queries and keys."""
    rotary_share: float = 0.25
    """position=rotary: share of each head's dimensions that rotates, above 0 and at most 1."""
    rotary_base: float = 10000.0
    """position=rotary: pair i of R rotating dimensions turns once in 2 pi * rotary_base^(2i/R) tokens, i from 0."""
    residual: Literal["sequential", "parallel"] = "sequential"
    """parallel: attention and feed-forward read the same input (GPT-NeoX)."""
    tie_word_embeddings: bool = True
    """One matrix for the input embedding and the output projection."""
    norm: str = "layernorm"
    """Normalization inside the blocks, before attention and feed-forward: layernorm or none (norms.py)."""
    final_norm: str = "layernorm"
    """Normalization after the last block: layernorm or none. The paper keeps it in every model."""
    norm_epsilon: float = 1e-5
    """What a norm adds to the variance before its root."""
    activation: str | list[str] = "gelu"
    """For all layers, or one per layer: gelu, gelu_tanh, relu, leaky_relu, identity (activations.py)."""
    negative_slope: float = 0.01
    """activation=leaky_relu: the slope below zero; where it starts if it is learnable."""
    learnable_slope: Literal["none", "per_layer", "shared"] = "none"
    """activation=leaky_relu: a fixed slope, one parameter per layer, or one parameter for all layers."""
    bias: Literal["none", "qk", "all"] = "qk"
    """Which projections have a bias: none, queries and keys (the paper's), or all."""
    initializer_range: float = 0.02
    """Standard deviation of every matrix at the start."""
    residual_init: Literal["flat", "scaled"] = "flat"
    """scaled: matrices that write to the residual stream start 1/sqrt(2 * num_hidden_layers) as large."""
    embedding_dropout: float = 0.0
    """After the embeddings."""
    attention_dropout: float = 0.0
    """Of attention weights."""
    residual_dropout: float = 0.0
    """After the attention and the feed-forward projection."""
    use_cache: bool = True
    """Return keys and values for generation (never while training, unless asked)."""
    bos_token_id: int | None = None
    """Token that begins a text; left out of a run, its tokenizer's."""
    eos_token_id: int | list[int] | None = None
    """Token that ends a text; left out of a run, its tokenizer's."""
    pad_token_id: int | None = None
    """Token that fills a batch."""

    def __post_init__(self, **others: Any) -> None:
        for key in others:
            if key not in TRANSFORMERS_KEYS and not key.startswith("_"):
                raise ValueError(f"unknown model field {key!r}; {_nearest(key, _own_names())}")
        for name in ("norm", "final_norm"):
            _check_in_table(name, getattr(self, name), list(NORMS))
        for field in _own_fields():
            self._check_type(field)
        self._check_activations()
        self._check_ranges()
        self._check_heads()
        self._check_slopes()
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**others)

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of one head that rotate (position=rotary)."""
        return round(self.head_dim * self.rotary_share)

    @property
    def layer_activations(self) -> list[str]:
        """Name of the activation of each layer."""
        if isinstance(self.activation, list):
            return self.activation
        return [self.activation] * self.num_hidden_layers

    def _check_type(self, field: Field) -> None:
        value = getattr(self, field.name)
        if field.type is float and type(value) is int:
            value = float(value)
            setattr(self, field.name, value)
        try:
            type_validator(field.name, value, field.type)
        except TypeError:
            raise ValueError(f"{field.name}={value!r}; allowed: {_describe(field.type)}") from None

    def _check_activations(self) -> None:
        if len(self.layer_activations) != self.num_hidden_layers:
            raise ValueError(
                f"activation lists {len(self.layer_activations)} names, but num_hidden_layers is "
                f"{self.num_hidden_layers}: give one name for all layers or one per layer"
            )
        for name in self.layer_activations:
            _check_in_table("activation", name, list(ACTIVATIONS))

    def _check_ranges(self) -> None:
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        for name in [*sizes, "max_position_embeddings", "norm_epsilon", "initializer_range", "rotary_base"]:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        for name in ("norm_epsilon", "initializer_range", "rotary_base", "negative_slope"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be finite")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")

    def _check_heads(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.position != "rotary":
            return
        if not 0 < self.rotary_share <= 1:
            raise ValueError(f"position='rotary' needs rotary_share above 0 and at most 1, got {self.rotary_share}")
        exact = self.head_dim * self.rotary_share
        if abs(exact - self.rotary_dim) > 1e-6 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_share={self.rotary_share} of {self.head_dim} dimensions of a head "
                f"(hidden_size={self.hidden_size} / num_attention_heads={self.num_attention_heads}) "
                f"is {exact:g}: they rotate in pairs, so this must be an even number"
            )

    def _check_slopes(self) -> None:
        if self.learnable_slope != "none" and "leaky_relu" not in self.layer_activations:
            raise ValueError(
                f"learnable_slope={self.learnable_slope!r} needs activation='leaky_relu', got {self.activation!r}"
            )


def _own_fields() -> list[Field]:
    return [field for field in fields(NormFreeConfig) if field.name in NormFreeConfig.__annotations__]


def _own_names() -> list[str]:
    return [field.name for field in _own_fields()]


def _check_in_table(field: str, name: Any, allowed: list[str]) -> None:
    if name not in allowed:
        raise ValueError(f"{field}={name!r}; {_nearest(str(name), allowed)}")


def _nearest(word: str, allowed: list[str]) -> str:
    close = get_close_matches(word, allowed, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"allowed: {', '.join(allowed)}"


def _describe(kind: Any) -> str:
    """A type in words: `one of 'a', 'b'`, `int or None`, `str or list of str`."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_describe, get_args(kind)))
    if get_origin(kind) is list:
        return f"list of {_describe(get_args(kind)[0])}"
    return "None" if kind is type(None) else kind.__name__
