"""NormFreeConfig: every choice of architecture is one field; the defaults are the paper's GPT-2 baseline.

No `from __future__ import annotations` here: building a config checks the types of its fields.
"""

import math
from dataclasses import Field, fields
from difflib import get_close_matches
from typing import Any, Literal

from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedConfig

# Keys that transformers writes to config.json or passes on, besides the fields of PreTrainedConfig and all that start
# with an underscore.
TRANSFORMERS_KEYS = {
    *("attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels"),
    *("output_attentions", "quantization_config", "tie_last_hidden_states", "torch_dtype"),
}

LINEAR_GROUPS = ("q", "k", "v", "o", "ffn")
"""Names of `NormFreeConfig.linear_groups`."""

NOT_IN: dict[str, dict[str, tuple[str, ...]]] = {
    "decoder": {"position": ("relative",)},
    "vision": {"position": ("rotary", "relative"), "attention_temperature": ("position",), "norm": ("fake", "taper")},
    "encoder_decoder": {"residual": ("parallel",), "attention_temperature": ("position",), "norm": ("fake", "taper")},
}
"""Values of fields that a family does not have."""


class NormFreeConfig(PreTrainedConfig):
    """Architecture of a transformer with or without normalization: a decoder, or by the subclasses another family.

    Raises ValueError for an unknown key, a value of the wrong type or out of range, and fields that contradict each
    other.
    """

    model_type = "normfree"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    """Tokens in the vocabulary; a run takes the default from its tokenizer."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Blocks of attention and feed-forward; family=encoder_decoder: so many in each of its two stacks."""
    num_attention_heads: int = 12
    """Heads of a block, each hidden_size / num_attention_heads wide."""
    intermediate_size: int | None = None
    """Width of the feed-forward part; None means 4 * hidden_size."""
    max_position_embeddings: int = 128
    """Longest sequence in tokens; a run takes the default from data.context."""
    family: Literal["decoder", "vision", "encoder_decoder"] = "decoder"
    """decoder: a language model; vision: a classifier of images; encoder_decoder: writes a target for a source (T5)."""
    image_size: int = 28
    """family=vision: pixels on each side of an image."""
    patch_size: int = 4
    """family=vision: pixels on each side of a patch; one patch is one token."""
    num_channels: int = 1
    """family=vision: colours of an image, 1 or 3."""
    pooling: Literal["class_token", "mean"] = "class_token"
    """family=vision: the class is read from a learned token before the patches, or from the mean over patches."""
    noise_share: float = 0.15
    """family=encoder_decoder: share of the tokens of a block that are masked and make the target."""
    span_tokens: float = 3.0
    """family=encoder_decoder: mean length of a masked span in tokens."""
    span_seed: int = 0
    """family=encoder_decoder: with the tokens of a block it decides which are masked, always the same."""
    target_tokens: int = 0
    """family=encoder_decoder: the last tokens of a row that hold its target; 0: masked spans of a block make it."""
    decoder_start_token_id: int | None = None
    """family=encoder_decoder: the token before a target; unless given, the last of the vocabulary."""
    position: Literal["learned", "rotary", "relative"] = "learned"
    """A learned vector for each position, rotated queries and keys, or a learned bias of scores by distance (T5)."""
    rotary_share: float = 0.25
    """position=rotary: share of each head's dimensions that rotate, above 0 and at most 1."""
    rotary_base: float = 10000.0
    """position=rotary: pair i of R rotating dimensions turns once in 2 pi * rotary_base^(2i/R) tokens, i from 0."""
    relative_buckets: int = 32
    """position=relative: distances that are told apart, half of them one by one, the others in growing steps."""
    relative_distance: int = 128
    """position=relative: the distance in tokens from which on all are alike."""
    residual: Literal["sequential", "parallel"] = "sequential"
    """parallel: attention and feed-forward read the same input (GPT-NeoX)."""
    tie_word_embeddings: bool = True
    """One matrix for the input embedding and the output projection."""
    norm: str = "layernorm"
    """Normalization in the blocks: layernorm, rmsnorm, lns, dyt, derf, bhyt, taper, fake, none (docs/architecture)."""
    final_norm: str = "layernorm"
    """Normalization after the last block: any of norm but taper. The paper keeps LayerNorm in every model."""
    norm_epsilon: float = 1e-5
    """layernorm, rmsnorm, lns, bhyt, taper, fake: added to the variance or mean square before the square root."""
    norm_steepness: float | list[float] = 1.0
    """norm=dyt, derf: initial factor of the input, for all, or one for attention, feed-forward and final norm."""
    taper_start_step: int = 0
    """norm=taper: the last optimiser step with the whole norm."""
    taper_end_step: int = 0
    """norm=taper: the optimiser step from which a fixed scale stands in its place."""
    fake_start_step: int = 0
    """norm=fake: the optimiser step from which the first norm, that of layer 0's feed-forward part, is fixed."""
    fake_gap_steps: int = 0
    """norm=fake: steps from one norm's removal to the next: feed-forward norms, attention norms, the final norm."""
    output_bias: bool = False
    """A bias on the logits: what a final norm leaves that was folded into the output projection."""
    placement: str = "pre"
    """Where a block's norms sit: pre, post, peri (input and output of a branch), mix (post first, then pre)."""
    post_share: float = 0.5
    """placement=mix: share of the layers, from the first on, whose norms sit as in post."""
    query_key_norm: str = "none"
    """Normalization of each head's queries and keys: rmsnorm or none."""
    branch: str = "plain"
    """How a branch joins the residual stream: plain, scaled_ffn, layerscale, rezero, fixed (docs/architecture.md)."""
    embedding_scale: Literal["none", "learned"] = "none"
    """learned: token embeddings times one learnable number that starts at sqrt(hidden_size)."""
    linear: str = "plain"
    """Weights of the blocks' linear maps: plain, weight_norm, spectral_norm."""
    linear_groups: list[str] | None = None
    """linear=weight_norm, spectral_norm: which maps, of q, k, v, o, ffn; None means all."""
    attention_temperature: str = "fixed"
    """Temperature of attention: fixed (1), or learned for each head, or for each head and query position (position)."""
    attention_sink: str = "none"
    """Extra logit in each softmax, for no token: none, softmax_1 (always 0), learned (per head)."""
    attention_gate: str = "none"
    """Sigmoid gate on the output of attention: none, one for each head, or one for each channel."""
    feed_forward: Literal["plain", "gated"] = "plain"
    """gated: the activated features are multiplied by a second linear map of the input (T5 v1.1, Llama)."""
    activation: str | list[str] = "gelu"
    """For all layers, or one per layer: gelu, gelu_tanh, relu, leaky_relu, identity (activations.py)."""
    negative_slope: float = 0.01
    """activation=leaky_relu: the slope below zero, or its initial value if it is learnable."""
    learnable_slope: Literal["none", "per_layer", "shared"] = "none"
    """activation=leaky_relu: a fixed slope, one parameter per layer, or one parameter for all layers."""
    bias: Literal["none", "qk", "all"] = "qk"
    """Projections with a bias: none, queries and keys (as in the paper), or all."""
    initializer_range: float = 0.02
    """Standard deviation of the initial value of every matrix."""
    residual_init: Literal["flat", "scaled"] = "flat"
    """scaled: matrices that write to the residual stream start smaller, by 1/sqrt(2 * num_hidden_layers)."""
    embedding_dropout: float = 0.0
    """Dropout after the embeddings."""
    attention_dropout: float = 0.0
    """Dropout of attention weights."""
    residual_dropout: float = 0.0
    """Dropout after the attention and the feed-forward projection."""
    use_cache: bool = True
    """Return keys and values for generation; in training only if forward asks for them."""
    bos_token_id: int | None = None
    """Token that begins a text; a run takes the default from its tokenizer."""
    eos_token_id: int | list[int] | None = None
    """Token that ends a text; a run takes the default from its tokenizer."""
    pad_token_id: int | None = None
    """Token that pads a batch."""

    def __post_init__(self, **others: Any) -> None:
        own_fields = [field for field in fields(NormFreeConfig) if field.name in NormFreeConfig.__annotations__]
        for key in others:
            if key not in TRANSFORMERS_KEYS and not key.startswith("_"):
                raise ValueError(f"unknown model field {key!r}; {_nearest(key, [field.name for field in own_fields])}")
        for field in own_fields:
            self._check_type(field)
        self._check_names()
        self._check_numbers()
        self._check_heads()
        self._check_parts()
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self._check_family()
        if self.family == "vision":
            patches = (self.image_size // self.patch_size) ** 2
            self.max_position_embeddings = patches + (self.pooling == "class_token")
        super().__post_init__(**others)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of one head that rotate (position=rotary)."""
        return round(self.head_dim * self.rotary_share)

    @property
    def layer_activations(self) -> list[str]:
        return self.activation if isinstance(self.activation, list) else [self.activation] * self.num_hidden_layers

    def _check_type(self, field: Field) -> None:
        value = getattr(self, field.name)
        if field.type in (float, float | list[float]) and type(value) is int:
            value = float(value)
            setattr(self, field.name, value)
        try:
            type_validator(field.name, value, field.type)
        except TypeError:
            allowed = field.type.__name__ if isinstance(field.type, type) else str(field.type).removeprefix("typing.")
            raise ValueError(f"{field.name}={value!r}; allowed: {allowed}") from None

    def _check_names(self) -> None:
        from .activations import ACTIVATIONS  # which reads this file, as the tables do
        from .tables import TABLES

        activations, layers = self.layer_activations, self.num_hidden_layers
        if len(activations) != layers:
            counts = f"{len(activations)} names, but num_hidden_layers is {layers}"
            raise ValueError(f"activation lists {counts}: give one name for all layers, or one for each")
        chosen = [(field, getattr(self, field), table) for field, table in TABLES.items()]
        chosen += [("activation", name, ACTIVATIONS) for name in activations]
        for field, name, table in chosen:
            if name not in table:
                raise ValueError(f"{field}={name!r}; {_nearest(name, list(table))}")
        if self.learnable_slope != "none" and "leaky_relu" not in activations:
            raise ValueError(f"learnable_slope={self.learnable_slope!r} needs activation='leaky_relu' in some layer")

    def _check_numbers(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        sizes += ("image_size", "patch_size", "num_channels", "relative_buckets", "relative_distance", "noise_share")
        for name in (*sizes, "norm_epsilon", "initializer_range", "rotary_base", "intermediate_size"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0 and finite")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout", "post_share", "noise_share"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1")

    def _check_heads(self) -> None:
        width, heads, share = self.hidden_size, self.num_attention_heads, self.rotary_share
        if width % heads:
            raise ValueError(f"hidden_size={width} must be a multiple of num_attention_heads={heads}")
        pairs = self.head_dim * share / 2
        if self.position == "rotary" and not (0 < share <= 1 and abs(pairs - round(pairs)) < 1e-6):
            dims = f"head_dim={self.head_dim} (hidden_size={width} / num_attention_heads={heads})"
            raise ValueError(f"rotary_share={share} of {dims} must be an even number of dimensions, from 2 to all")

    def _check_parts(self) -> None:
        for name, sequential in (("placement", ("post", "mix")), ("branch", ("scaled_ffn",))):
            if self.residual == "parallel" and (value := getattr(self, name)) in sequential:
                raise ValueError(f"{name}={value!r} needs residual='sequential', got 'parallel'")
        steepness = self.norm_steepness if isinstance(self.norm_steepness, list) else [self.norm_steepness] * 3
        if len(steepness) != 3 or not all(0 < value < math.inf for value in steepness):
            three = "three (attention, feed-forward, final norm)"
            raise ValueError(f"norm_steepness={self.norm_steepness}; give one number above 0, or {three}")
        if unknown := set(self.linear_groups or ()) - set(LINEAR_GROUPS):
            raise ValueError(f"linear_groups names {', '.join(sorted(unknown))}; allowed: {', '.join(LINEAR_GROUPS)}")
        start, gap = self.fake_start_step, self.fake_gap_steps
        if self.norm == "fake" and (start < 1 or gap < 0):
            raise ValueError(f"norm='fake' needs fake_start_step={start} above 0, fake_gap_steps={gap} not below 0")
        if self.norm == "fake" and self.placement != "pre":
            raise ValueError(f"norm='fake' needs placement='pre', got {self.placement!r}: it folds into what reads it")
        if self.final_norm == "fake" and self.norm != "fake":
            raise ValueError(f"final_norm='fake' needs norm='fake', got {self.norm!r}: the final norm goes last")
        if self.final_norm == "taper":
            raise ValueError("final_norm='taper': without a final norm the logits run away, so it stays; give another")
        if self.norm == "taper" and not 0 <= self.taper_start_step < self.taper_end_step:
            steps = f"taper_start_step={self.taper_start_step} below taper_end_step={self.taper_end_step}"
            raise ValueError(f"norm='taper' needs {steps}, e.g. model.taper_end_step=5000")

    def _check_family(self) -> None:
        if self.family == "vision" and self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if not self.span_tokens >= 1:
            raise ValueError(f"span_tokens={self.span_tokens} must be at least 1")
        if not 4 <= (buckets := self.relative_buckets) < (distance := self.relative_distance):
            raise ValueError(f"relative_buckets={buckets} must be at least 4 and below relative_distance={distance}")
        for name, values in NOT_IN[self.family].items():
            if (value := getattr(self, name)) in values:
                others = " or ".join(repr(family) for family in NOT_IN if value not in NOT_IN[family].get(name, ()))
                raise ValueError(f"{name}={value!r} is for family={others}, and this is {self.family!r}: give another")


class NormFreeVisionConfig(NormFreeConfig):
    """A NormFreeConfig with family=vision; transformers' Auto classes tell families apart by the class."""

    model_type = "normfree_vision"
    keys_to_ignore_at_inference = []
    family: Literal["decoder", "vision", "encoder_decoder"] = "vision"


class NormFreeSeq2SeqConfig(NormFreeConfig):
    """A NormFreeConfig with family=encoder_decoder."""

    model_type = "normfree_seq2seq"
    family: Literal["decoder", "vision", "encoder_decoder"] = "encoder_decoder"
    is_encoder_decoder: bool = True

    def __post_init__(self, **others: Any) -> None:
        super().__post_init__(**others)
        self.use_cache = False  # a target is computed again for each of its tokens
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.vocab_size - 1


def _nearest(word: str, allowed: list[str]) -> str:
    close = get_close_matches(word, allowed, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"allowed: {', '.join(allowed)}"
