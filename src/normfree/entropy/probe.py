"""EntropyProbe: measure the attention heads of any Hugging Face causal LM while it runs.

Inside the context a tap shows every attention call, and hooks tell when a forward pass is whole. On leaving, also after
an exception, everything is as before. Config and training mode are never touched.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from normfree.entropy.eager import EagerHooks
from normfree.entropy.functional import measure
from normfree.entropy.request import AttentionEntropy
from normfree.entropy.routing import AttentionCall
from normfree.entropy.statistics import HeadEntropy
from normfree.entropy.sums import HeadSums, Sums, sums_of
from normfree.entropy.support import UnsupportedModel, without_rows
from normfree.entropy.tap import AttentionTap, watched
from normfree.entropy.visibility import padding_rows

ProbeMethod = Literal["auto", "eager"]
_measured_now: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class EntropyProbe:
    """Measure every head in each whole forward pass inside the `with`; a recomputed forward counts once.

    ```
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    probe.statistics().mean_nats()    # (L, H), nats
    ```
    method: 'auto' measures through the attention registry, memory linear in the context; 'eager' reads the
        attention matrices that the model returns (O(T^2) memory), for families that do not use the registry.
    patterns: also measure mean attended distance and the mass on the first token.

    The model may be wrapped (DDP, torch.compile), in any dtype or autocast and, but for method='eager', in training
    mode: dropout does not affect what is measured. Probes of different models may be nested, not two of one model.
    Raises UnsupportedModel for a model without softmax attention or one that needs method='eager'.
    """

    def __init__(self, model: nn.Module, method: ProbeMethod = "auto", *, patterns: bool = False) -> None:
        if method not in ("auto", "eager"):
            raise ValueError(f"method={method!r}; allowed: 'auto', 'eager'")
        if method == "eager" and patterns:
            raise ValueError("patterns=True needs method='auto'")
        models = _outermost_models(model)  # a model may be wrapped
        if len(models) != 1:
            name = type(model).__name__
            raise UnsupportedModel(
                f"{name} holds several Hugging Face models; use one probe for each"
                if models
                else f"{name} is no Hugging Face model; load one with AutoModelForCausalLM"
            )
        [self._model] = models
        if reason := without_rows(self._model.config.model_type):
            raise UnsupportedModel(reason)
        self._patterns = patterns
        self._sums = HeadSums()
        self._pass = _Pass(self._sums)
        self._watched: list[nn.Module] = []
        if method == "eager":
            self._source = EagerHooks(self._model, self._sums)
        else:
            self._source = AttentionTap(self._model, self._read)
            attention = set(self._source.modules)  # and the modules around them: each may be the one that is called
            self._watched = [part for part in self._model.modules() if not attention.isdisjoint(part.modules())]

    def __enter__(self) -> EntropyProbe:
        parts = self._watched or [self._model]
        if not _measured_now.isdisjoint(self._model.modules()):
            raise ValueError("this model is being measured by another EntropyProbe; leave that one first")
        with ExitStack() as attached:
            _measured_now.update(parts)
            attached.callback(_measured_now.difference_update, parts)
            attached.enter_context(self._source)
            for module in self._watched:
                attached.enter_context(watched(module, self._pass.cross))
            self._attached = attached.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._attached.__exit__(*error)

    def statistics(self) -> HeadEntropy:
        """Sums and counts over all whole forward passes so far. Raises ValueError if there was none."""
        return self._sums.statistics()

    def _read(self, layer: int, call: AttentionCall) -> None:
        if self._pass.repeats(call.q, call.k, call.mask):
            return
        if self._patterns:
            call.check_first_token(layer)
        entropies = measure(call.request(patterns=self._patterns))
        own_mask = None if call.mask is None else call.mask[..., : call.own_keys]
        padded = padding_rows(own_mask, call.q.shape[2], call.own_keys)
        if padded is not None:
            entropies = replace(entropies, visible=entropies.visible.masked_fill(padded, 0))
        visible = entropies.visible
        # A row that sees one key behind a row that is no padding: a second text begins.
        if self._patterns and not call.chunked and bool(((visible[..., 1:] == 1) & (visible[..., :-1] > 0)).any()):
            raise ValueError("several texts are packed into one row; give a padded batch, or leave out patterns=True")
        self._pass.add(layer, entropies)


class _Pass(threading.local):
    """The forward pass of this thread: the modules that it is inside of, outermost first, and its attention calls.

    A pass counts once its outermost module has returned; one that ends in an exception leaves nothing.
    """

    def __init__(self, sums: HeadSums) -> None:
        self._sums = sums
        self._inside: list[int] = []
        self._calls: list[tuple[int, Sums]] = []
        self._last_call: tuple[Tensor | None, ...] = ()

    def cross(self, slot: int, begins: bool) -> None:
        """Begin or end the forward call of a module. If it never returned from the last one, that pass is dropped."""
        self._last_call = ()
        if begins:
            if not self._inside or slot in self._inside:
                self._inside, self._calls = [], []
            self._inside.append(slot)
        elif slot in self._inside:
            del self._inside[self._inside.index(slot) :]
            self._count_if_whole()

    def repeats(self, *tensors: Tensor | None) -> bool:
        """True if the current module has just attended with these very tensors.

        diffllama does so for each half of its values; both calls are one row for a query and head.
        """
        before, self._last_call = self._last_call, tensors if self._inside else ()
        return bool(before) and list(map(_place, before)) == list(map(_place, tensors))

    def add(self, layer: int, entropies: AttentionEntropy) -> None:
        """Add the rows of one attention call."""
        self._calls.append((layer, sums_of(entropies)))
        self._count_if_whole()

    def _count_if_whole(self) -> None:
        if not self._inside:
            calls, self._calls = self._calls, []
            self._sums.add(calls)


def _place(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride())


def _outermost_models(module: nn.Module) -> list[PreTrainedModel]:
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _outermost_models(child)]
