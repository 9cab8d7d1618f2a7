"""EntropyProbe: measure the attention heads of any Hugging Face causal LM while it runs.

Inside the context the current entry in the registry of attention functions measures and then calls the function that it
replaces, and hooks tell when a forward pass is whole. On leaving, also after an exception, everything is as before.
Config and training mode are never touched.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Literal, cast

from torch import nn
from transformers import PreTrainedModel

from normfree.entropy.eager import EagerHooks
from normfree.entropy.recorder import SLOT, Recorder
from normfree.entropy.routing import registry_of, routed_attention
from normfree.entropy.statistics import HeadEntropy
from normfree.entropy.support import UnsupportedModel, refusal, without_rows
from normfree.entropy.swap import RECORDERS, install, watch

ProbeMethod = Literal["auto", "eager"]
_next_slot = itertools.count()
# A module keeps its number for life: code compiled inside one probe serves the next.
_slots: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
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

    The model may be wrapped (DDP, torch.compile) and in any mode, dtype or autocast; dropout does not affect what is
    measured. Probes of different models may be nested; a second one on a model is refused.
    Raises UnsupportedModel for a model without softmax attention or one that needs method='eager'.
    """

    def __init__(self, model: nn.Module, method: ProbeMethod = "auto", *, patterns: bool = False) -> None:
        if method not in ("auto", "eager"):
            raise ValueError(f"method={method!r}; allowed: 'auto', 'eager'")
        if method == "eager" and patterns:
            raise ValueError("patterns=True needs method='auto'")
        self._model = _pretrained(model)
        if reason := without_rows(self._model.config.model_type):
            raise UnsupportedModel(reason)
        self._patterns = patterns
        self._recorder = Recorder()
        self._hooks = EagerHooks(self._model, self._recorder) if method == "eager" else None
        self._modules = {} if self._hooks else routed_attention(self._model)
        if not self._hooks and not self._modules:
            raise UnsupportedModel(refusal(self._model.config.model_type))
        attention = set(self._modules.values())  # and the modules around them: each may be the one that is called
        self._watched = [part for part in self._model.modules() if not attention.isdisjoint(part.modules())]
        self._undo: list[Callable[[], None]] = []
        self._implementations: dict[str, str] = {}

    def __enter__(self) -> EntropyProbe:
        if any(module in _measured_now for module in self._model.modules()):
            raise ValueError("this model is being measured by another EntropyProbe; leave that one first")
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        used = self._implementations.items()
        changed = any(self._implementation(self._modules[name]) != implementation for name, implementation in used)
        self._detach()
        if changed and error is None:
            raise ValueError("the attention implementation was changed inside the probe; change it before")

    def statistics(self) -> HeadEntropy:
        """Sums and counts over all whole forward passes so far. Raises ValueError if there was none."""
        if not self._recorder.sums:
            raise ValueError(
                "nothing was measured: call the model inside the `with`; if you did, its attention bypasses the "
                "registry: load it with attn_implementation='sdpa'"
            )
        return self._recorder.statistics()

    def _attach(self) -> None:
        _measured_now.update(self._watched or [self._model])
        if self._hooks:
            self._hooks.attach()
        for module in self._watched:
            slot = _slots.setdefault(module, next(_next_slot))
            RECORDERS[slot] = (self._recorder, cast(int, getattr(module, "layer_idx", -1)), self._patterns)
            self._undo += [handle.remove for handle in watch(module, slot)]
        entries = {}
        for name, module in self._modules.items():
            setattr(module, SLOT, _slots[module])
            registry = registry_of(module)
            implementation = self._implementations[name] = self._implementation(module)
            entries[id(registry), implementation] = (registry, implementation)
        for registry, implementation in entries.values():
            self._undo.append(install(registry, implementation))

    def _implementation(self, module: nn.Module) -> str:
        return cast(str, getattr(module, "config", self._model.config)._attn_implementation)

    def _detach(self) -> None:
        if self._hooks:
            self._hooks.detach()
        while self._undo:
            self._undo.pop()()
        for module in self._watched:
            RECORDERS.pop(_slots.get(module, -1), None)
            vars(module).pop(SLOT, None)
        _measured_now.difference_update(self._watched or [self._model])


def _pretrained(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model, which may be wrapped."""
    outermost: dict[str, PreTrainedModel] = {}
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and not any(f"{name}.".startswith(f"{outer}.") for outer in outermost):
            outermost[name] = part
        if "" in outermost:
            break
    if len(outermost) > 1:
        names = ", ".join(outermost)
        raise ValueError(f"{type(model).__name__} holds several Hugging Face models ({names}); use one probe for each")
    if not outermost:
        raise UnsupportedModel(f"{type(model).__name__} is no Hugging Face model; load one with AutoModelForCausalLM")
    return next(iter(outermost.values()))
