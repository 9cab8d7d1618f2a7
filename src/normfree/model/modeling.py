"""The decoder: embeddings, blocks and the final norm, and a language model on top."""

# B batch, T query (new tokens), S key (cached and new), E hidden size, F feed-forward width,
# H heads, D head dim, V vocabulary

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention import Attention
from .blocks import BLOCKS, Block, NormSums
from .configuration import NormFreeConfig
from .linears import Projection, ResidualProjection
from .loss import next_token_loss
from .norms import NORMS, NormSite
from .positions import POSITIONS


@dataclass
class TrainingTerms:
    """What outputs of models have besides transformers' own fields."""

    head_entropies: Tensor | None = None
    """(layers of entropy_layers, ascending, H): mean entropy in nats over rows and sequences, with gradients."""
    norm_sums: Tensor | None = None
    """(norms that have sums, sums of each), in training."""
    sigma_variance: Tensor | None = None
    """With `sigma_variance=True`: variance over a sequence's tokens of what the final norm divides by; mean."""


@dataclass
class NormFreeModelOutput(TrainingTerms, BaseModelOutputWithPast):
    """Final hidden states."""


@dataclass
class NormFreeCausalLMOutput(TrainingTerms, CausalLMOutputWithPast):
    """A language model's output."""


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
        if isinstance(module, ResidualProjection):
            scales = {"flat": 1.0, "scaled": (2 * self.config.num_hidden_layers) ** -0.5}
            init.normal_(module.weight, std=self.config.initializer_range * scales[self.config.residual_init])
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("slope"):
                init.constant_(parameter, self.config.negative_slope)
        initial_values: dict[str, float] = getattr(module, "initial_values", {})
        for name, value in initial_values.items():
            init.constant_(getattr(module, name), value)
        class_token: Tensor | None = getattr(module, "class_token", None)
        if class_token is not None:
            init.normal_(class_token, std=self.config.initializer_range)
        if isinstance(module, Projection):
            module.start_maps()

    def batch_of(self, rows_BT: Tensor) -> dict[str, Tensor]:
        """Arguments of forward, and `labels` unless these are the tokens, for rows of a corpus."""
        return {"input_ids": rows_BT}

    @property
    def has_state(self) -> bool:
        """True if `advance` changes anything."""
        callers = NormFreePreTrainedModel, Projection  # their `advance` calls those of norms and linear maps
        return any(hasattr(each, "advance") and not isinstance(each, callers) for each in self.modules())

    def advance(self, step: int, norm_sums: Tensor | None = None) -> None:
        """Move state that changes while training to its state after optimiser step `step`.

        `norm_sums`: the model's output of that name, added up over the step's micro-batches and processes. Call it once
        for each optimiser step; forward passes change nothing.
        """
        norms_with_state: list[Any] = [module for module in self.modules() if hasattr(module, "sums")]
        for norm, sums in zip(norms_with_state, () if norm_sums is None else norm_sums, strict=True):
            norm.advance(step, sums)
        for module in self.modules():
            if isinstance(module, Projection):
                module.advance()

    def negative_slopes(self) -> dict[str, Tensor]:
        """Copies of all learnable slopes (parameters `...slope` of one element), in layer order: float32 scalars."""
        # FSDP may have sharded them over processes.
        whole: dict[str, Any] = {name: getattr(slope, "full_tensor", slope.detach)() for name, slope in self._slopes()}
        return {name: slope.detach().float().reshape(()).clone() for name, slope in whole.items()}

    def _slopes(self) -> list[tuple[str, nn.Parameter]]:
        return [item for item in self.named_parameters() if item[0].endswith("slope") and item[1].numel() == 1]

    def slope_layers(self) -> list[int | str]:
        """The layer of each of `negative_slopes`, without shared slopes; `encoder 0` where there are two stacks."""
        places = [re.search(r"((?:en|de)coder)?\.?layers\.(\d+)", name) for name, _ in self._slopes()]
        return [f"{place[1]} {place[2]}" if place[1] else int(place[2]) for place in places if place]


class NormFreeModel(NormFreePreTrainedModel):
    """Embeddings, blocks and the final norm."""

    blocks: ClassVar[dict[str, type[Block]]] = BLOCKS
    is_causal: ClassVar[bool] = True
    """True if a token sees those before it only."""

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = self.build_embedding()
        learned_scale = config.embedding_scale == "learned"
        self.embedding_scale = nn.Parameter(torch.empty(1)) if learned_scale else None
        self.initial_values = {"embedding_scale": config.hidden_size**0.5} if learned_scale else {}
        self.positions = POSITIONS[config.position](config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        # The shared slope is registered here and passed to the blocks: see activations.py.
        shared = config.learnable_slope == "shared"
        self.shared_negative_slope = nn.Parameter(torch.empty(1)) if shared else None
        block = self.blocks[config.residual]
        blocks = (block(config, index, is_causal=self.is_causal) for index in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        site = NormSite("final", config.num_hidden_layers, config.hidden_size)
        self.final_norm = NORMS[config.final_norm](config, site)
        self.gradient_checkpointing = False
        self.post_init()

    def build_embedding(self) -> nn.Module:
        """The first layer, which makes the input (B, T, E)."""
        return nn.Embedding(self.config.vocab_size, self.config.hidden_size)

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        entropy_layers: Collection[int] = (),
        **kwargs: Any,
    ) -> NormFreeModelOutput:
        """Final hidden states (B, T, E). `position_ids` (B, T) default to 0, 1, ... after the cache.

        `entropy_layers`: layers whose mean head entropies are returned too, with gradients, for full blocks.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if entropy_layers:
            whole = attention_mask is None and position_ids is None and past_key_values is None
            self._check_entropy_layers(entropy_layers, whole_blocks=whole)
        tokens_BTE = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        # Before the cache exists: with one, this does not separate texts in one row.
        positions_BT = None if tokens_BTE.is_meta else position_ids
        mask = create_causal_mask(self.config, tokens_BTE, attention_mask, past_key_values, positions_BT)
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        context = {"attention_mask": mask, "past_key_values": past_key_values, "entropy_layers": entropy_layers}
        return self._outputs(tokens_BTE, position_ids, **context, **kwargs)

    def _outputs(
        self,
        tokens_BTE: Tensor,
        position_ids: Tensor | None = None,
        *,
        past_key_values: Cache | None = None,
        sigma_variance: bool = False,
        **context: Any,
    ) -> NormFreeModelOutput:
        """What tokens become, from their positions to the final norm."""
        positions_BT = position_ids
        if positions_BT is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            positions_BT = (torch.arange(tokens_BTE.shape[1], device=tokens_BTE.device) + seen)[None]
        if self.embedding_scale is not None:
            tokens_BTE = tokens_BTE * self.embedding_scale
        placed_BTE, rotation = self.positions(tokens_BTE, positions_BT)
        hidden_BTE = self.dropout(placed_BTE)
        # Positional, as they may need gradients.
        tensors = [context.pop(name, None) for name in ("attention_mask", "encoded_BSE", "encoder_mask")]
        context |= {"past_key_values": past_key_values, "position_ids": position_ids}
        context |= {"rotation": rotation, "token_positions": positions_BT}
        entropies, sums = [], NormSums()
        for block in self.layers:
            outputs = block(hidden_BTE, self.shared_negative_slope, *tensors, **context)
            hidden_BTE, entropies_H, norm_sums = outputs if isinstance(outputs, tuple) else (outputs, None, None)
            entropies += [] if entropies_H is None else [entropies_H]
            sums.extend([] if norm_sums is None else norm_sums)
        last_BTE = sums.apply(self.final_norm, hidden_BTE)
        variance = hidden_BTE.float().std(-1, correction=0).var(1, correction=0).mean() if sigma_variance else None
        return NormFreeModelOutput(
            last_hidden_state=last_BTE,
            past_key_values=past_key_values,
            head_entropies=torch.stack(entropies) if entropies else None,
            norm_sums=torch.stack(sums) if sums else None,
            sigma_variance=variance,
        )

    def _check_entropy_layers(self, entropy_layers: Collection[int], *, whole_blocks: bool) -> None:
        if not whole_blocks:
            raise ValueError("entropy_layers needs full blocks: no attention_mask, position_ids or cache")
        if self.config.attention_sink != "none":
            raise ValueError("entropy_layers needs attention_sink='none', so that attention rows sum to 1")
        if not set(entropy_layers) <= set(range(len(self.layers))):
            raise ValueError(f"entropy_layers={list(entropy_layers)}; allowed: 0 to {len(self.layers) - 1}")


class NormFreeForCausalLM(NormFreePreTrainedModel, GenerationMixin):
    """A language model: hidden states to logits, and the loss of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__(config)
        self.model = NormFreeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.output_bias)
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
    ) -> NormFreeCausalLMOutput:
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
        if labels is None or return_logits or other_loss or not is_plain(self.lm_head):
            positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits_BTV = self.lm_head(outputs.last_hidden_state[:, positions])
            if labels is not None:
                loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        else:
            items = kwargs.get("num_items_in_batch")
            loss = next_token_loss(outputs.last_hidden_state, self.lm_head.weight, labels, items)
        passed = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return NormFreeCausalLMOutput(loss=loss, logits=logits_BTV if return_logits else None, **passed)


def is_plain(head: nn.Module) -> bool:
    """True if the weight determines the output: no bias, adapter or hook, and no offloaded weight."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not head.weight.is_meta
        and "forward" not in vars(head)  # accelerate puts one there to move weights
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )
