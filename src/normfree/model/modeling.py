"""The decoder: attention, feed-forward, blocks, and a language model on top.

The constructors choose modules from tables; no forward asks which variant it is.
"""

# B batch, T query (new tokens), S key (cached and new), E hidden size, F feed-forward width,
# H heads, D head dim, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .activations import ACTIVATIONS
from .attention import (
    eager_attention_forward,
    nan_where_all_scores_are,
    trains_faster_written_out,
    written_out_causal_attention,
)
from .configuration import NormFreeConfig
from .loss import next_token_loss
from .norms import NORMS
from .positions import POSITIONS, Rotation, rotate


class QueryKeyBiasLinear(nn.Linear):
    """Queries, keys and values in one matmul; only queries and keys have a bias."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 3 * hidden_size, bias=False)
        self.bias = nn.Parameter(torch.empty(2 * hidden_size))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, F.pad(self.bias, (0, self.in_features)))


QKV_PROJECTIONS = {
    "none": lambda hidden_size: nn.Linear(hidden_size, 3 * hidden_size, bias=False),
    "qk": QueryKeyBiasLinear,
    "all": lambda hidden_size: nn.Linear(hidden_size, 3 * hidden_size),
}


class ResidualLinear(nn.Linear):
    """A projection that writes to the residual stream; `residual_init` scales its initial weights."""


class Attention(nn.Module):
    """Causal softmax attention through transformers' AttentionInterface."""

    def __init__(self, config: NormFreeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.qkv = QKV_PROJECTIONS[config.bias](config.hidden_size)
        self.output = ResidualLinear(config.hidden_size, config.hidden_size, bias=config.bias == "all")
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_BTE: Tensor,
        *,
        attention_mask: Tensor | None,
        rotation: Rotation | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, tokens, _ = hidden_BTE.shape
        qkv_3BHTD = self.qkv(hidden_BTE).view(batch, tokens, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        query_BHTD, key_BHSD, value_BHSD = qkv_3BHTD.unbind(0)
        if rotation is not None:
            query_BHTD, key_BHSD = rotate(query_BHTD, rotation), rotate(key_BHSD, rotation)
        if past_key_values is not None:
            key_BHSD, value_BHSD = past_key_values.update(key_BHSD, value_BHSD, self.layer_idx)
        implementation = self.config._attn_implementation or "eager"
        fused = implementation == "sdpa"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        probed = attend is not sdpa_attention_forward  # a probe puts its own function there
        if not probed and past_key_values is None and trains_faster_written_out(query_BHTD, attention_mask):
            fused, attend = False, written_out_causal_attention
        mixed_BTHD, weights_BHTS = attend(
            self,
            query_BHTD,
            key_BHSD,
            value_BHSD,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        written_BTE = self.output(mixed_BTHD.reshape(batch, tokens, -1))
        if fused and query_BHTD.device.type == "cpu":
            written_BTE = written_BTE + nan_where_all_scores_are(query_BHTD, key_BHSD, attention_mask)
        return self.dropout(written_BTE), weights_BHTS


class FeedForward(nn.Module):
    """Widen, activate, project back."""

    def __init__(self, config: NormFreeConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.intermediate_size
        assert width is not None, "NormFreeConfig fills intermediate_size"
        self.input = nn.Linear(config.hidden_size, width, bias=config.bias == "all")
        self.activation = ACTIVATIONS[config.layer_activations[layer_idx]](config)
        self.output = ResidualLinear(width, config.hidden_size, bias=config.bias == "all")
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, hidden_BTE: Tensor, shared_slope: Tensor | None) -> Tensor:
        features_BTF = self.activation(self.input(hidden_BTE), shared_slope)
        return self.dropout(self.output(features_BTF))


class Block(GradientCheckpointingLayer):
    """Base class of both residual forms.

    Tensors that need gradients are positional: reentrant checkpointing loses gradients of keywords.
    """

    def __init__(self, config: NormFreeConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = NORMS[config.norm](config)
        self.attention = Attention(config, layer_idx)
        self.feed_forward_norm = NORMS[config.norm](config)
        self.feed_forward = FeedForward(config, layer_idx)


class SequentialBlock(Block):
    """The feed-forward part reads the output of attention (GPT-2)."""

    def forward(self, hidden_BTE: Tensor, shared_slope: Tensor | None, **context: Any) -> Tensor:
        hidden_BTE = hidden_BTE + self.attention(self.attention_norm(hidden_BTE), **context)[0]
        return hidden_BTE + self.feed_forward(self.feed_forward_norm(hidden_BTE), shared_slope)


class ParallelBlock(Block):
    """Attention and the feed-forward part read the same input (GPT-NeoX)."""

    def forward(self, hidden_BTE: Tensor, shared_slope: Tensor | None, **context: Any) -> Tensor:
        attended_BTE = self.attention(self.attention_norm(hidden_BTE), **context)[0]
        return hidden_BTE + attended_BTE + self.feed_forward(self.feed_forward_norm(hidden_BTE), shared_slope)


BLOCKS = {"sequential": SequentialBlock, "parallel": ParallelBlock}


class NormFreePreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights."""

    config: NormFreeConfig
    config_class = NormFreeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [block.__name__ for block in BLOCKS.values()]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ResidualLinear):
            scales = {"flat": 1.0, "scaled": (2 * self.config.num_hidden_layers) ** -0.5}
            init.normal_(module.weight, std=self.config.initializer_range * scales[self.config.residual_init])
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("slope"):
                init.constant_(parameter, self.config.negative_slope)

    def negative_slopes(self) -> dict[str, Tensor]:
        """Copies of all learnable slopes, by parameter name, in layer order: float32 scalars.

        A slope is a parameter of one element whose name ends in `slope`: one for each leaky layer, one in all if it is
        shared, none if slopes are fixed.
        """
        return {
            name: parameter.detach().float().reshape(()).clone()
            for name, parameter in self.named_parameters()
            if name.endswith("slope") and parameter.numel() == 1
        }

    def slope_layers(self) -> list[int]:
        """The layer of each of `negative_slopes`, without the shared slope."""
        places = [name.split(".") for name in self.negative_slopes()]
        return [int(place[place.index("layers") + 1]) for place in places if "layers" in place]


class NormFreeModel(NormFreePreTrainedModel):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = POSITIONS[config.position](config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        # The shared slope is registered here and passed to the blocks: see activations.py.
        shared = config.learnable_slope == "shared"
        self.shared_negative_slope = nn.Parameter(torch.empty(1)) if shared else None
        self.layers = nn.ModuleList(BLOCKS[config.residual](config, index) for index in range(config.num_hidden_layers))
        self.final_norm = NORMS[config.final_norm](config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final hidden states (B, T, E). `position_ids` (B, T) default to 0, 1, ... after the cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        tokens_BTE = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        mask = create_causal_mask(  # before the cache exists: with one, this does not separate texts in one row
            config=self.config,
            inputs_embeds=tokens_BTE,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=None if tokens_BTE.is_meta else position_ids,
        )
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        positions_BT = position_ids
        if positions_BT is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            positions_BT = (torch.arange(tokens_BTE.shape[1], device=tokens_BTE.device) + seen)[None]
        placed_BTE, rotation = self.positions(tokens_BTE, positions_BT)
        hidden_BTE = self.dropout(placed_BTE)
        for block in self.layers:
            hidden_BTE = block(
                hidden_BTE,
                self.shared_negative_slope,
                attention_mask=mask,
                rotation=rotation,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.final_norm(hidden_BTE), past_key_values=past_key_values)


class NormFreeForCausalLM(NormFreePreTrainedModel, GenerationMixin):
    """A language model: hidden states to logits, and the loss of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__(config)
        self.model = NormFreeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and with `labels` (B, T) the mean cross-entropy in nats; -100 is ignored.

        This shifts `labels`: pass `input_ids` itself. `logits_to_keep`: the last so many positions, or an index tensor;
        0 keeps all. `return_logits=False` (needs `labels`) returns the loss alone, computed in blocks of tokens to save
        memory, with first derivatives only. If the output layer has a bias, an adapter or hooks, or with `shift_labels`
        or `ignore_index`, the loss comes from all logits after all.
        """
        if not return_logits and labels is None:
            raise ValueError("return_logits=False needs labels: pass labels=input_ids")
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits_BTV, loss = None, None
        other_loss = not {"shift_labels", "ignore_index"}.isdisjoint(kwargs)
        if labels is None or return_logits or other_loss or not _is_plain(self.lm_head):
            positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits_BTV = self.lm_head(outputs.last_hidden_state[:, positions])
            if labels is not None:
                vocab_size = self.config.vocab_size
                loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=vocab_size, **kwargs)
        else:
            items = kwargs.get("num_items_in_batch")
            loss = next_token_loss(outputs.last_hidden_state, self.lm_head.weight, labels, items)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV if return_logits else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _is_plain(head: nn.Module) -> bool:
    """True if the weight determines the output: no bias, adapter or hook, and no offloaded weight."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not head.weight.is_meta
        and "forward" not in vars(head)  # accelerate puts one there to move weights
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )
