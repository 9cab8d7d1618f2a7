"""The blocks: feed-forward, and how attention and feed-forward read and write the residual stream.

The constructors choose modules from tables; no forward asks which variant it is. x is the residual stream, F attention
or feed-forward. A placement names places, each with a norm of its own: `input` is x + F(N(x)), `output` is x + N(F(x)),
`stream` is N(x + F(x)). The builder of a branch takes the config and the part, and returns a module called as
`join(stream, written)`, both (B, T, E), where `written` is what F computes.
"""

# B batch, T tokens, S tokens of the encoder, E hidden size, F feed-forward width, H heads

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .activations import ACTIVATIONS
from .attention import Attention, CrossAttention
from .configuration import NormFreeConfig
from .linears import ResidualProjection, projection
from .norms import NORMS, NormSite

Part = Literal["attention", "feed_forward"]


def _mixed(config: NormFreeConfig, layer: int) -> set[str]:
    layers = config.num_hidden_layers
    post = min(max(int(config.post_share * layers + 0.5), 1), layers - 1)  # at least one of either
    return {"stream"} if layer < post else {"input"}


PLACEMENTS: dict[str, Callable[[NormFreeConfig, int], set[str]]] = {
    "pre": lambda config, layer: {"input"},
    "post": lambda config, layer: {"stream"},
    "peri": lambda config, layer: {"input", "output"},
    "mix": _mixed,
}


class Add(nn.Module):
    """stream + factor * written, with a fixed factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, stream: Tensor, written: Tensor) -> Tensor:
        return stream + (written if self.factor == 1.0 else self.factor * written)


class AddScaled(nn.Module):
    """stream + scale * written, with a learnable scale for each channel (LayerScale) or for all (ReZero)."""

    def __init__(self, channels: int, start: float) -> None:
        super().__init__()
        self.initial_values = {"scale": start}
        self.scale = nn.Parameter(torch.empty(channels))

    def forward(self, stream: Tensor, written: Tensor) -> Tensor:
        return stream + self.scale * written


class AddWeighted(nn.Module):
    """stream_weight * stream + written / divisor, two learnable scalars (scaled FFN, arXiv 2501.03489)."""

    def __init__(self) -> None:
        super().__init__()
        self.initial_values = {"stream_weight": 1.0, "divisor": 1.0}
        self.stream_weight, self.divisor = (nn.Parameter(torch.empty(1)) for _ in range(2))

    def forward(self, stream: Tensor, written: Tensor) -> Tensor:
        return self.stream_weight * stream + written / self.divisor


def layerscale_start(layers: int) -> float:
    """Initial LayerScale at a depth: 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond (CaiT, arXiv 2103.17239)."""
    return 0.1 if layers <= 18 else 1e-5 if layers <= 24 else 1e-6


BRANCHES: dict[str, Callable[[NormFreeConfig, Part], nn.Module]] = {
    "plain": lambda config, part: Add(),
    "scaled_ffn": lambda config, part: AddWeighted() if part == "feed_forward" else Add(),
    "layerscale": lambda config, part: AddScaled(config.hidden_size, layerscale_start(config.num_hidden_layers)),
    "rezero": lambda config, part: AddScaled(1, 0.0),
    # 0.2 at 18 layers (OP block, arXiv 2405.19279), scaled by depth.
    "fixed": lambda config, part: Add(0.2 * (18 / config.num_hidden_layers) ** 0.5),
}


class FeedForward(nn.Module):
    """Widen, activate, project back."""

    def __init__(self, config: NormFreeConfig, layer_idx: int) -> None:
        super().__init__()
        width = cast(int, config.intermediate_size)  # NormFreeConfig fills it
        self.input = projection(config, ["ffn"], config.hidden_size, width)
        self.activation = ACTIVATIONS[config.layer_activations[layer_idx]](config)
        self.output = projection(config, ["ffn"], width, config.hidden_size, ResidualProjection)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, hidden_BTE: Tensor, shared_slope: Tensor | None) -> Tensor:
        features_BTF = self.activation(self.input(hidden_BTE), shared_slope)
        return self.dropout(self.output(features_BTF))


class GatedFeedForward(FeedForward):
    """The activated features times a second linear map of the input (arXiv 2002.05202)."""

    def __init__(self, config: NormFreeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate = projection(config, ["ffn"], config.hidden_size, self.input.out_features)

    def forward(self, hidden_BTE: Tensor, shared_slope: Tensor | None) -> Tensor:
        features_BTF = self.activation(self.input(hidden_BTE), shared_slope) * self.gate(hidden_BTE)
        return self.dropout(self.output(features_BTF))


FEED_FORWARDS = {"plain": FeedForward, "gated": GatedFeedForward}


class NormSums(list[Tensor]):
    """In training, the sums of those norms that were called and whose state `advance` changes."""

    def apply(self, norm: nn.Module, features: Tensor) -> Tensor:
        """Normalize `features`, and add the norm's sums if it has any."""
        sums: Callable[[Tensor], Tensor] | None = getattr(norm, "sums", None)
        if sums is not None and norm.training:
            self.append(sums(features))
        return norm(features)


def norms_at(config: NormFreeConfig, layer_idx: int, part: Part) -> list[nn.Module]:
    """The norms of a part's input and output, and of the stream behind it."""
    places, site = PLACEMENTS[config.placement](config, layer_idx), NormSite(part, layer_idx, config.hidden_size)
    chosen = [config.norm if place in places else "none" for place in ("input", "output", "stream")]
    return [NORMS[name](config, site) for name in chosen]


class Block(GradientCheckpointingLayer):
    """Attention, then a feed-forward part that reads its output (GPT-2).

    Tensors that need gradients are positional: reentrant checkpointing loses gradients of keywords.
    """

    def __init__(self, config: NormFreeConfig, layer_idx: int, *, is_causal: bool) -> None:
        super().__init__()
        norms_of = partial(norms_at, config, layer_idx)
        self.attention_norm, self.attention_output_norm, self.attention_stream_norm = norms_of("attention")
        self.attention = Attention(config, layer_idx, is_causal=is_causal)
        self.attention_join = BRANCHES[config.branch](config, "attention")
        self.feed_forward_norm, self.feed_forward_output_norm, self.feed_forward_stream_norm = norms_of("feed_forward")
        self.feed_forward = FEED_FORWARDS[config.feed_forward](config, layer_idx)
        self.feed_forward_join = BRANCHES[config.branch](config, "feed_forward")

    def forward(
        self,
        hidden_BTE: Tensor,
        shared_slope: Tensor | None,
        attention_mask: Tensor | None = None,
        encoded_BSE: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        **context: Any,
    ) -> Tensor | tuple[Any, ...]:
        """The next hidden states; with `entropy_layers`, or norms that have sums, also (H,) and (norms, n), or None."""
        sums = NormSums()
        normed_BTE = sums.apply(self.attention_norm, hidden_BTE)
        attended_BTE, _, entropies_H = self.attention(normed_BTE, attention_mask=attention_mask, **context)
        joined_BTE = self.attention_join(hidden_BTE, sums.apply(self.attention_output_norm, attended_BTE))
        joined_BTE = sums.apply(self.attention_stream_norm, joined_BTE)
        joined_BTE = self.read_encoder(joined_BTE, encoded_BSE, attention_mask=encoder_mask, **context)
        source_BTE = self.feed_forward_input(hidden_BTE, joined_BTE)
        fed_BTE = self.feed_forward(sums.apply(self.feed_forward_norm, source_BTE), shared_slope)
        joined_BTE = self.feed_forward_join(joined_BTE, sums.apply(self.feed_forward_output_norm, fed_BTE))
        joined_BTE = sums.apply(self.feed_forward_stream_norm, joined_BTE)
        if entropies_H is None and not sums:
            return joined_BTE
        return joined_BTE, entropies_H, torch.stack(sums) if sums else None

    def read_encoder(self, joined_BTE: Tensor, encoded_BSE: Tensor | None, **context: Any) -> Tensor:
        """The stream after attention to an encoder's states; unchanged in a block that has none."""
        return joined_BTE

    def feed_forward_input(self, hidden_BTE: Tensor, joined_BTE: Tensor) -> Tensor:
        """What the feed-forward part reads: the block's input, or that with attention's output."""
        return joined_BTE


class CrossBlock(Block):
    """Between attention and the feed-forward part, attention to the states of an encoder (T5)."""

    def __init__(self, config: NormFreeConfig, layer_idx: int, *, is_causal: bool) -> None:
        super().__init__(config, layer_idx, is_causal=is_causal)
        self.cross_norm, self.cross_output_norm, self.cross_stream_norm = norms_at(config, layer_idx, "attention")
        self.cross_attention = CrossAttention(config, layer_idx, is_causal=False)
        self.cross_join = BRANCHES[config.branch](config, "attention")

    def read_encoder(self, joined_BTE: Tensor, encoded_BSE: Tensor | None, **context: Any) -> Tensor:
        context |= {"encoded_BSE": encoded_BSE, "rotation": None}
        attended_BTE, _, _ = self.cross_attention(self.cross_norm(joined_BTE), **context)
        return self.cross_stream_norm(self.cross_join(joined_BTE, self.cross_output_norm(attended_BTE)))


class ParallelBlock(Block):
    """Attention and the feed-forward part read the same input (GPT-NeoX)."""

    def feed_forward_input(self, hidden_BTE: Tensor, joined_BTE: Tensor) -> Tensor:
        return hidden_BTE


BLOCKS = {"sequential": Block, "parallel": ParallelBlock}
