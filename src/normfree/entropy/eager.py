"""The way in for families that do not use the attention registry: their own eager attention matrices."""

# B batch, H heads, T query, S key

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from normfree.entropy.functional import AttentionEntropy
from normfree.entropy.recorder import SLOT, Recorder, is_recomputation
from normfree.entropy.routing import routed_attention
from normfree.entropy.support import UnsupportedModel

_LARGEST_ERROR_OF_A_SUM = 0.01
"""Of a row of probabilities in bf16; the largest seen was 0.0025."""


class EagerHooks:
    """Ask every forward pass for `attentions`, add them up, and hand on what the caller asked for.

    Memory is O(T^2) for every layer. The model must be in eager attention already; its config is not touched.
    """

    def __init__(self, model: PreTrainedModel, recorder: Recorder) -> None:
        chosen = model.config._attn_implementation
        if chosen not in ("eager", None):
            raise UnsupportedModel(
                f"method='eager' needs the model in eager attention, it is in {chosen!r}; load it with "
                f"attn_implementation='eager'"
            )
        if model.config.model_type == "big_bird" and model.config.attention_type != "original_full":
            raise UnsupportedModel(
                f"big_bird returns no whole matrices under attention_type={model.config.attention_type!r}; load it "
                "with attention_type='original_full'"
            )
        self._model = model
        self._recorder = recorder
        self._handles: list[RemovableHandle] = []
        self._routed = bool(routed_attention(model))
        self._call = threading.local()

    def attach(self) -> None:
        """Add the two hooks to the model, and the mark that it is being measured."""
        setattr(self._model, SLOT, None)
        # Functions, since copies of a model share those; on a copy they outlive the probe.
        self._handles = [
            self._model.register_forward_pre_hook(
                lambda *call: self._ask(*call) if self._handles else None, with_kwargs=True
            ),
            self._model.register_forward_hook(
                lambda *call: self._take(*call) if self._handles else None, with_kwargs=True
            ),
        ]

    def detach(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()
        if hasattr(self._model, SLOT):
            delattr(self._model, SLOT)

    def _ask(self, _model: Any, args: Any, asked: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        config = self._model.config
        if self._model.training and _drops_attention(config.to_dict()):
            raise UnsupportedModel("method='eager' would read attention after its dropout; call model.eval() first")
        self._call.wanted = asked.get("output_attentions")
        chosen = asked.get("return_dict")
        self._call.as_tuple = not (getattr(config, "return_dict", True) if chosen is None else chosen)
        return args, asked | {"output_attentions": True, "return_dict": True}

    def _take(self, _model: Any, args: Any, asked: dict[str, Any], output: Any) -> Any:
        attentions = getattr(output, "attentions", None)
        if not attentions:
            raise UnsupportedModel(
                f"{type(self._model).__name__} returned no attention matrices; it cannot be measured"
            )
        given = inspect.signature(self._model.forward).bind_partial(*args, **asked).arguments
        if getattr(given.get("past_key_values"), "is_compileable", False):
            raise UnsupportedModel("method='eager' does not read a static cache; use a dynamic one, or none")
        padding = given.get("attention_mask")
        layers = _attention_layers(self._model.config, attentions)
        if not is_recomputation():
            self._recorder.enter(0)
            for layer, p_BHTS in layers.items():
                if p_BHTS is not None:
                    self._recorder.add(layer, self._measured(layer, p_BHTS, padding))
            self._recorder.leave(0)
        if not (self._model.config.output_attentions if self._call.wanted is None else self._call.wanted):
            output.attentions = None
        return output.to_tuple() if self._call.as_tuple else output

    def _measured(self, layer: int, p_BHTS: Tensor, padding: Tensor | None) -> AttentionEntropy:
        if p_BHTS.dtype == torch.float16:
            raise UnsupportedModel(
                "method='eager' reads matrices as the model rounds them, and fp16 rounds small shares to 0, as if "
                "their keys were hidden; load the model in float32 or bfloat16"
            )
        if padding is not None and padding.dim() != 2:
            raise UnsupportedModel(
                "method='eager' knows padding by an attention_mask of (batch, tokens), and got one of "
                f"{tuple(padding.shape)}; give no mask of rows, and in generation no static cache"
            )
        config = self._model.config
        is_local = getattr(config, "attention_layers", [])[layer : layer + 1] == ["local"]  # gpt_neo
        visible = None if self._routed else _causally_visible(p_BHTS, padding, config.window_size if is_local else None)
        found = entropy_of_probabilities(p_BHTS, padding, visible)
        # What routes is served better by method='auto', and some of it reports weights without their sink.
        if not self._routed:
            total_BHT = p_BHTS.sum(-1, dtype=torch.float32)
            off_BHT = found.counted & ((total_BHT - 1).abs() > _LARGEST_ERROR_OF_A_SUM)
            if bool(off_BHT.any()):
                raise UnsupportedModel(
                    f"{type(self._model).__name__} returns matrices whose rows are no whole distributions (layer "
                    f"{layer}: one sums to {float(total_BHT[off_BHT].min()):.3f}); it cannot be measured"
                )
        return found


def _attention_layers(config: Any, attentions: Sequence[Tensor]) -> dict[int, Tensor]:
    """The matrices by layer. Hybrid models return those of their attention layers alone, or (minimax) the states of
    linear attention among them, which are left out."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    softmax = [kind == "hybrid" or (kind.endswith("attention") and kind != "linear_attention") for kind in kinds]
    attend = [layer for layer, is_one in enumerate(softmax) if is_one]
    if len(attend) == len(attentions):
        return dict(zip(attend, attentions, strict=True))
    softmax = softmax if len(softmax) == len(attentions) else [True] * len(attentions)
    return {layer: p_BHTS for layer, p_BHTS in enumerate(attentions) if softmax[layer]}


def _drops_attention(config: dict[str, Any]) -> bool:
    """Whether a config has a dropout above 0 that may be attention's: attn_pdrop, attention_dropout, dropout, ..."""
    named = {name: value for name, value in config.items() if isinstance(value, float) and "drop" in name}
    nested = [value for name, value in config.items() if isinstance(value, dict) and "att" in name]
    found = any(value > 0 for name, value in named.items() if "att" in name or name in ("dropout", "dropout_p"))
    return found or any(_drops_attention(part) for part in nested)


def _causally_visible(p_BHTS: Tensor, padding: Tensor | None, window: int | None) -> Tensor | None:
    """(B or 1, 1, T, S): what causality, a window and padding leave to see; None where a row sees a later token."""
    queries, keys = p_BHTS.shape[-2:]
    padding = None if padding is None or padding.shape[-1] != keys else padding[:, None]
    later_BHT = (p_BHTS.triu(keys - queries + 1) > 0).any(-1)
    if padding is not None:  # rows of padding are uniform over all keys
        later_BHT = later_BHT & (padding[..., -queries:] != 0)
    if bool(later_BHT.any()):
        return None
    visible_TS = torch.ones(queries, keys, dtype=torch.bool, device=p_BHTS.device).tril(keys - queries)
    if window is not None:
        visible_TS = visible_TS.triu(keys - queries - window + 1)
    return visible_TS[None, None] if padding is None else visible_TS & (padding[:, None] != 0)


def entropy_of_probabilities(
    p_BHTS: Tensor, padding: Tensor | None = None, visible_B1TS: Tensor | None = None
) -> AttentionEntropy:
    """Entropy of given attention matrices (B, H, T, S); a key counts as visible if any head puts mass on it, or
    `visible_B1TS` says so: shares of very sharp heads are rounded to 0.

    `padding` (B, up to and with the queries), 0 for padding, leaves out the rows of padded queries. Where it is shorter
    than T, what the model itself put before the tokens (the image of git) is no padding.
    """
    p_BHTS = p_BHTS.to(torch.promote_types(p_BHTS.dtype, torch.float32))
    nats_BHT = torch.special.entr(p_BHTS).sum(-1)
    seen_B1TS = (p_BHTS > 0).any(1, keepdim=True)
    # Where a head is NaN the others tell what may be seen; where all are, nobody does.
    untold_B1T1 = p_BHTS.isnan().any(-1, keepdim=True).all(1, keepdim=True)
    if visible_B1TS is not None:
        seen_B1TS = seen_B1TS | visible_B1TS
    visible_B1T = (seen_B1TS | (untold_B1T1 & p_BHTS.isnan().any(1, keepdim=True))).sum(-1)
    if padding is not None:
        queries = p_BHTS.shape[2]
        own_BT = torch.nn.functional.pad(padding[:, -queries:], (max(0, queries - padding.shape[1]), 0), value=1)
        visible_B1T = visible_B1T * (own_BT[:, None] != 0)
    visible_BHT = visible_B1T.expand_as(nats_BHT).to(torch.int32)
    exact_BH = torch.ones(p_BHTS.shape[:2], dtype=torch.bool, device=p_BHTS.device)
    return AttentionEntropy(nats_BHT.masked_fill(visible_BHT == 0, torch.nan), visible_BHT, exact_BH)
