"""Measure families that do not use the attention registry, by the matrices that their eager attention returns."""

# B batch, H heads, T query, S key

import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from normfree.entropy.layers import HeadLayer, attention_layers
from normfree.entropy.request import AttentionEntropy
from normfree.entropy.statistics import HeadSums
from normfree.entropy.support import UnsupportedModel
from normfree.entropy.tap import is_recomputation
from normfree.entropy.visibility import Visibility

_LARGEST_ERROR_OF_A_SUM = 0.01  # of a row of probabilities in bf16; the largest seen was 0.0025

_FIELDS = {
    "attentions": ("", "attention_mask"),
    "encoder_attentions": ("encoder", "attention_mask"),
    "decoder_attentions": ("decoder", "decoder_attention_mask"),
    "cross_attentions": ("cross", "decoder_attention_mask"),
}
"""Fields of a model's output that hold matrices: their group of heads, and the argument with the queries' padding."""


class EagerHooks:
    """Request `attentions` from every forward pass, add them up, and return what the caller requested.

    Memory is O(T^2) for every layer. The model must be in eager attention already; its config is not touched.
    """

    def __init__(self, model: PreTrainedModel, sums: HeadSums) -> None:
        config = model.config
        if config._attn_implementation not in ("eager", None):
            raise UnsupportedModel("method='eager': load the model with attn_implementation='eager'")
        if config.model_type == "big_bird" and config.attention_type != "original_full":
            raise UnsupportedModel("method='eager': load big_bird with attention_type='original_full'")
        self._model, self._sums = model, sums
        self._handles: list[RemovableHandle] = []
        self._routed = bool(attention_layers(model))
        self._call = threading.local()

    def __enter__(self) -> None:
        # Copies of the model share the hooks and keep them, so they end with the probe by themselves.
        def while_attached(hook: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *call: hook(*call) if self._handles else None

        request, read = while_attached(self._request_matrices), while_attached(self._read_matrices)
        self._handles.append(self._model.register_forward_pre_hook(request, with_kwargs=True))
        self._handles.append(self._model.register_forward_hook(read, with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _request_matrices(self, _model: Any, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        config = self._model.config
        if self._model.training:
            raise UnsupportedModel("method='eager' would read attention after its dropout; call model.eval() first")
        attentions, as_dict = named.get("output_attentions"), named.get("return_dict")
        self._call.returns_attentions = config.output_attentions if attentions is None else attentions
        self._call.returns_dict = getattr(config, "return_dict", True) if as_dict is None else as_dict
        return args, named | {"output_attentions": True, "return_dict": True}

    @torch.no_grad()
    def _read_matrices(self, _model: Any, args: Any, named: dict[str, Any], output: Any) -> Any:
        groups = {name: value for name in _FIELDS if (value := getattr(output, name, None))}
        if not groups:
            raise UnsupportedModel(f"{type(self._model).__name__} returned no attention matrices")
        arguments = inspect.signature(self._model.forward).bind_partial(*args, **named).arguments
        if getattr(arguments.get("past_key_values"), "is_compileable", False):
            raise UnsupportedModel("method='eager' does not read a static cache; use a dynamic one, or none")
        if not is_recomputation():
            measured = {}
            for name, attentions in groups.items():
                group, mask = _FIELDS[name]
                matrices = _attention_layers(self._model.config, attentions) if group == "" else enumerate(attentions)
                for number, p_BHTS in matrices:
                    layer = HeadLayer.of(group if len(groups) > 1 else "", number)
                    measured[layer] = self._measure(layer, p_BHTS, arguments.get(mask))
            for layer, entropies in measured.items():
                self._sums.add(layer, entropies)
        if not self._call.returns_attentions:
            for name in groups:
                setattr(output, name, None)
        return output if self._call.returns_dict else output.to_tuple()

    def _measure(self, layer: HeadLayer, p_BHTS: Tensor, padding: Tensor | None) -> AttentionEntropy:
        if p_BHTS.dtype == torch.float16:
            raise UnsupportedModel("fp16 rounds small probabilities to 0; load the model in float32 or bfloat16")
        if padding is not None and padding.dim() != 2:
            raise UnsupportedModel(
                f"attention_mask has shape {tuple(padding.shape)}; method='eager' needs (batch, tokens), and in "
                "generation no static cache"
            )
        config = self._model.config
        is_local = getattr(config, "attention_layers", [])[layer.number :][:1] == ["local"]  # gpt_neo
        is_known = self._routed or layer.is_cross
        visible = None if is_known else _causally_visible(p_BHTS, padding, config.window_size if is_local else None)
        entropies = entropy_of_probabilities(p_BHTS, padding, visible)
        # Some routed families report weights without their sinks; method='auto' serves those better.
        if not self._routed:
            total_BHT = p_BHTS.sum(-1, dtype=torch.float32)
            off_BHT = entropies.counted & ((total_BHT - 1).abs() > _LARGEST_ERROR_OF_A_SUM)
            if bool(off_BHT.any()):
                raise UnsupportedModel(
                    f"{type(self._model).__name__} returns no probabilities: a row of layer {layer} sums to "
                    f"{float(total_BHT[off_BHT].min()):.3f}"
                )
        return entropies


def _attention_layers(config: Any, attentions: Sequence[Tensor | None]) -> Iterable[tuple[int, Tensor]]:
    """The matrices with their layers' numbers, without the states of linear attention that minimax adds.

    Other hybrid models return those of their attention layers alone.
    """
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    softmax = [
        layer
        for layer, kind in enumerate(kinds)
        if kind == "hybrid" or (kind.endswith("attention") and kind != "linear_attention")
    ]
    if len(kinds) == len(attentions):
        matrices = {layer: attentions[layer] for layer in softmax}
    else:
        layers = softmax if len(softmax) == len(attentions) else range(len(attentions))
        matrices = dict(zip(layers, attentions, strict=True))
    return ((layer, p_BHTS) for layer, p_BHTS in matrices.items() if p_BHTS is not None)


def _causally_visible(p_BHTS: Tensor, padding: Tensor | None, window: int | None) -> Tensor | None:
    """(B or 1, 1, T, S): the keys visible under causality, window and padding; None if a row sees a later token."""
    queries, keys = p_BHTS.shape[-2:]
    later_BHT = (p_BHTS.triu(keys - queries + 1) > 0).any(-1)
    mask = None
    if padding is not None and padding.shape[-1] == keys:  # rows of padding are uniform over all keys
        mask = (padding != 0)[:, None, None]
        later_BHT = later_BHT & mask[..., 0, -queries:]
    if bool(later_BHT.any()):
        return None
    return Visibility(queries, keys, True, window, mask, p_BHTS.device).whole().visible


def entropy_of_probabilities(
    p_BHTS: Tensor, padding: Tensor | None = None, visible_B1TS: Tensor | None = None
) -> AttentionEntropy:
    """Entropy of attention matrices (B, H, T, S).

    A key counts as visible if any head puts mass on it, or `visible_B1TS` says so: sharp heads round small
    probabilities to 0. `padding` (B, up to and with the queries) is 0 for padded queries, whose rows are left out; what
    a model puts before the tokens (the image of git) is no padding.
    """
    p_BHTS = p_BHTS.to(torch.promote_types(p_BHTS.dtype, torch.float32))
    nats_BHT = torch.special.entr(p_BHTS).sum(-1)
    seen_B1TS = (p_BHTS > 0).any(1, keepdim=True)
    # Where a head is NaN the others show which keys are visible; where all are NaN, none does.
    unknown_B1T1 = p_BHTS.isnan().any(-1, keepdim=True).all(1, keepdim=True)
    if visible_B1TS is not None:
        seen_B1TS = seen_B1TS | visible_B1TS
    visible_B1T = (seen_B1TS | (unknown_B1T1 & p_BHTS.isnan().any(1, keepdim=True))).sum(-1)
    if padding is not None:
        queries = p_BHTS.shape[2]
        own_BT = torch.nn.functional.pad(padding[:, -queries:], (max(0, queries - padding.shape[1]), 0), value=1)
        visible_B1T = visible_B1T * (own_BT[:, None] != 0)
    return AttentionEntropy.of_rows(visible_B1T.expand_as(nats_BHT).to(torch.int32), exact=True, nats=nats_BHT)
