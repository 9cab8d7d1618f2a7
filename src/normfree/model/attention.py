"""Attention: the module, and functions for transformers' AttentionInterface."""

# B batch, H heads, T query (new tokens), S key (cached and new, or the encoder's), D head dim, E hidden size,
# N batch times heads

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_parts import GATES, SINKS, TEMPERATURES, AttentionInput
from .configuration import NormFreeConfig
from .head_entropy import entropies_of_weights, head_entropies
from .linears import Projection, QueryKeyBiasProjection, ResidualProjection, projection
from .norms import QUERY_KEY_NORMS, NormSite
from .positions import Rotation, rotate


def eager_attention_forward(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Explicit attention for `attn_implementation="eager"`: returns (B, T, H, D) and the weights (B, H, T, S)."""
    scores_BHTS = query_BHTD @ key_BHSD.mT * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores_BHTS = scores_BHTS.masked_fill(~attention_mask, torch.finfo(scores_BHTS.dtype).min)
    elif attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    exact = torch.promote_types(scores_BHTS.dtype, torch.float32)
    weights_BHTS = F.softmax(scores_BHTS, dim=-1, dtype=exact).to(value_BHSD.dtype)
    weights_BHTS = F.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ value_BHSD).transpose(1, 2), weights_BHTS


LONGEST_WRITTEN_OUT = 512
"""Up to so many tokens, training in bf16 on the CPU is faster with explicit attention (docs/performance.md)."""


def written_out_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Explicit attention of full blocks, (B, T, H, D), in the inputs' dtype, and its weights (N, T, S).

    A mask is added to the scores. For training in bf16 on the CPU, where the backward pass of fused attention is slow.
    """
    (batch, heads, tokens, _), keys = query_BHTD.shape, key_BHSD.shape[2]
    if attention_mask is None:
        added = torch.full((tokens, keys), -torch.inf, dtype=query_BHTD.dtype).triu(1 if module.is_causal else keys)
    else:
        added = attention_mask.to(query_BHTD.dtype).expand(batch, heads, -1, -1).flatten(0, 1)
    with torch.autocast("cpu", enabled=False):
        scores_NTS = torch.baddbmm(added, query_BHTD.flatten(0, 1), key_BHSD.flatten(0, 1).mT, alpha=scaling)
        weights_NTS = F.softmax(scores_NTS, dim=-1)
        dropped_NTS = F.dropout(weights_NTS, p=dropout, training=module.training)
        mixed_BHTD = (dropped_NTS @ value_BHSD.flatten(0, 1)).unflatten(0, (batch, heads))
        return mixed_BHTD.transpose(1, 2), weights_NTS


def trains_faster_written_out(query_BHTD: Tensor, attention_mask: Tensor | None) -> bool:
    """True for short blocks without padding, in bf16 on the CPU, that need gradients."""
    return (
        (attention_mask is None or attention_mask.is_floating_point())  # a bias; sdpa's masks of padding are boolean
        and query_BHTD.requires_grad
        and query_BHTD.device.type == "cpu"
        and query_BHTD.dtype == torch.bfloat16
        and query_BHTD.shape[2] <= LONGEST_WRITTEN_OUT
    )


@torch.no_grad()
def nan_where_all_scores_are(query_BHTD: Tensor, key_BHSD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T, 1): NaN if a query of any head or its first visible key is not finite, else 0.

    On CPUs with AVX512, torch's fused attention returns 0 for a row whose scores are all NaN (seen in 2.13), which
    would hide a broken weight. With a mask the first visible key is not known here, so only queries count.
    """
    sums_BHT = query_BHTD.sum(-1, dtype=torch.float32)
    if attention_mask is None:
        sums_BHT = sums_BHT + key_BHSD[:, :, :1].sum(-1, dtype=torch.float32)
    return (sums_BHT * 0).sum(1)[..., None].to(query_BHTD.dtype)


class Attention(nn.Module):
    """Softmax attention through transformers' AttentionInterface."""

    def __init__(self, config: NormFreeConfig, layer_idx: int, *, is_causal: bool) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, is_causal
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        qkv_kind = QueryKeyBiasProjection if config.bias == "qk" else Projection
        self.qkv = projection(config, ["q", "k", "v"], config.hidden_size, config.hidden_size, qkv_kind)
        site = NormSite("query_key", layer_idx, config.head_dim)
        self.query_norm, self.key_norm = (QUERY_KEY_NORMS[config.query_key_norm](config, site) for _ in range(2))
        self.temperature = TEMPERATURES[config.attention_temperature](config)
        self.sink = SINKS[config.attention_sink](config)
        self.gate = GATES[config.attention_gate](config)
        self.output = projection(config, ["o"], config.hidden_size, config.hidden_size, ResidualProjection)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_BTE: Tensor,
        *,
        attention_mask: Tensor | None,
        rotation: Rotation | None,
        token_positions: Tensor,
        past_key_values: Cache | None,
        encoded_BSE: Tensor | None = None,
        entropy_layers: Collection[int] = (),
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output (B, T, E), attention weights or None, and the heads' mean entropy (H,) or None."""
        batch, tokens, _ = hidden_BTE.shape
        query_BHTD, key_BHSD, value_BHSD = self.queries_keys_values(hidden_BTE, encoded_BSE)
        query_BHTD, key_BHSD = self.query_norm(query_BHTD), self.key_norm(key_BHSD)
        if rotation is not None:
            query_BHTD, key_BHSD = rotate(query_BHTD, rotation), rotate(key_BHSD, rotation)
        query_BHTD = self.temperature(query_BHTD, token_positions)
        if past_key_values is not None:
            key_BHSD, value_BHSD = past_key_values.update(key_BHSD, value_BHSD, self.layer_idx)
        implementation = self.config._attn_implementation or "eager"
        fused = implementation == "sdpa"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        probed = attend is not sdpa_attention_forward  # a probe puts its own function there
        if not probed and past_key_values is None and trains_faster_written_out(query_BHTD, attention_mask):
            fused, attend = False, written_out_attention
        inputs = AttentionInput(query_BHTD, key_BHSD, value_BHSD, attention_mask)
        if self.sink is not None:
            kwargs["before_sink"] = (*inputs, self.sink.logits(query_BHTD))  # what a probe measures
            inputs = self.sink.prepend(inputs, self.scaling)
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed_BTHD, weights_BHTS = attend(self, *inputs, scaling=self.scaling, dropout=dropout, **kwargs)
        entropies_H = None
        if attend is written_out_attention:
            if self.layer_idx in entropy_layers:
                entropies_H = entropies_of_weights(weights_BHTS, batch)
            weights_BHTS = None
        elif self.layer_idx in entropy_layers:
            entropies_H = head_entropies(query_BHTD, key_BHSD, self.scaling, causal=self.is_causal)
        if self.sink is not None:
            mixed_BTHD, weights_BHTS = self.sink.remove(mixed_BTHD, weights_BHTS, like=query_BHTD)
        mixed_BTHD = self.gate(mixed_BTHD, hidden_BTE)
        written_BTE = self.output(mixed_BTHD.reshape(batch, tokens, -1))
        if fused and query_BHTD.device.type == "cpu":
            written_BTE = written_BTE + nan_where_all_scores_are(query_BHTD, key_BHSD, attention_mask)
        return self.dropout(written_BTE), weights_BHTS, entropies_H

    def queries_keys_values(self, hidden_BTE: Tensor, encoded_BSE: Tensor | None) -> Sequence[Tensor]:
        """Queries (B, H, T, D), and keys and values (B, H, S, D)."""
        return self._heads(self.qkv(hidden_BTE), 3)

    def _heads(self, projected: Tensor, parts: int) -> Sequence[Tensor]:
        return projected.unflatten(-1, (parts, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


class CrossAttention(Attention):
    """Queries of the hidden states attend to keys and values of an encoder's states."""

    def queries_keys_values(self, hidden_BTE: Tensor, encoded_BSE: Tensor | None) -> Sequence[Tensor]:
        assert encoded_BSE is not None
        width = self.config.hidden_size
        query_BTE, key_value_BSG = self.qkv(hidden_BTE, slice(width)), self.qkv(encoded_BSE, slice(width, None))
        return [*self._heads(query_BTE, 1), *self._heads(key_value_BSG, 2)]
