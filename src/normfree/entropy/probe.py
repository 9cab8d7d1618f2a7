"""EntropyProbe: measure the attention heads of any Hugging Face model while it runs."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from normfree.entropy.eager import EagerHooks
from normfree.entropy.functional import measure
from normfree.entropy.layers import HeadLayer
from normfree.entropy.request import AttentionEntropy
from normfree.entropy.routing import AttentionCall
from normfree.entropy.statistics import HeadEntropy, HeadSums
from normfree.entropy.support import NOT_MEASURED, UnsupportedModel
from normfree.entropy.tap import AttentionTap

ProbeMethod = Literal["auto", "eager"]


class EntropyProbe:
    """Measure every head in each forward pass inside the `with`; a recomputed forward counts once.

    ```
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    probe.statistics().mean_nats()    # (L, H), nats
    ```
    method: 'auto' measures through the attention registry, memory linear in the context; 'eager' reads the
        attention matrices that the model returns (O(T^2) memory), for families that do not use the registry.
    patterns: also measure mean attended distance and the mass on the first token.

    The model may be wrapped (DDP, torch.compile), in any dtype or autocast and, but for method='eager', in training
    mode: dropout does not affect what is measured. Probes may be nested, with method='eager' of different models. On
    leaving, also after an exception, everything is as before. Raises UnsupportedModel for a model without softmax
    attention or one that needs method='eager'.
    """

    def __init__(self, model: nn.Module, method: ProbeMethod = "auto", *, patterns: bool = False) -> None:
        if method not in ("auto", "eager"):
            raise ValueError(f"method={method!r}; allowed: 'auto', 'eager'")
        if method == "eager" and patterns:
            raise ValueError("patterns=True needs method='auto'")
        models = _outermost_models(model)  # a model may be wrapped
        if len(models) != 1:
            advice = "use one probe for each" if models else "load one with AutoModelForCausalLM or AutoModel"
            raise UnsupportedModel(f"{type(model).__name__} holds {len(models)} Hugging Face models; {advice}")
        [self._model] = models
        kind = self._model.config.model_type
        if kind in NOT_MEASURED:
            raise UnsupportedModel(f"{kind} {NOT_MEASURED[kind]}, so it is not measured; choose another model")
        self._patterns = patterns
        self._sums = HeadSums()
        self._tap = AttentionTap(self._model, self._read) if method == "auto" else EagerHooks(self._model, self._sums)
        self._before = threading.local()

    def __enter__(self) -> EntropyProbe:
        self._tap.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._before = threading.local()
        self._tap.__exit__(*error)

    def statistics(self) -> HeadEntropy:
        """Sums and counts over all forward passes so far. Raises ValueError if there was none."""
        return self._sums.statistics()

    def _read(self, layer: HeadLayer, call: AttentionCall) -> None:
        if self._model.config.model_type == "diffllama" and self._repeats(call):
            return
        entropies = measured_rows(layer, call, patterns=self._patterns)
        if layer.is_cross and entropies.distance is not None:  # positions of two sequences have no distance
            entropies = replace(entropies, distance=torch.full_like(entropies.distance, torch.nan))
        self._sums.add(layer, entropies)

    def _repeats(self, call: AttentionCall) -> bool:
        """True if the call before had these very tensors: two calls, for two halves of the values, are one row."""
        before, self._before.call = getattr(self._before, "call", None), call  # kept: its memory has no other use
        return before is not None and all(
            a.data_ptr() == b.data_ptr() for a, b in zip(before[:2], call[:2], strict=True)
        )


def measured_rows(layer: HeadLayer, call: AttentionCall, *, patterns: bool) -> AttentionEntropy:
    """The rows of a call; padded ones see no key. With patterns, all taps of a call share what is measured.

    Raises ValueError for patterns where distances or the first token are unknown.
    """
    if patterns and not layer.is_cross:
        call.check_first_token(layer)
    rows = call.once(_rows_with_patterns) if patterns else measure(call.request())
    if call.padded is not None:
        rows = replace(rows, visible=rows.visible.masked_fill(call.padded, 0))
    in_order = patterns and not (layer.is_cross or call.chunked)
    # A row that sees one key behind a row that is no padding: a second text begins.
    if in_order and bool(((rows.visible[..., 1:] == 1) & (rows.visible[..., :-1] > 0)).any()):
        raise ValueError("several texts are packed into one row; give a padded batch, or leave out patterns=True")
    return rows


def _rows_with_patterns(call: AttentionCall) -> AttentionEntropy:
    return measure(call.request(patterns=True))


def _outermost_models(module: nn.Module) -> list[PreTrainedModel]:
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _outermost_models(child)]
