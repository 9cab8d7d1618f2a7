"""EntropyProbe: measure the attention heads of any Hugging Face causal LM while it runs.

Inside the context the entry in use in the registry of attention functions is one that measures and then
calls the function it stands for, and hooks tell when a forward pass is whole; on leaving, also after an
exception, all is as it was. Config and training mode are never touched.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Literal, cast

from torch import nn
from transformers import PreTrainedModel

from normfree.entropy.eager import EagerHooks
from normfree.entropy.recorder import SLOT, Recorder
from normfree.entropy.routing import registry_of, routed_attention
from normfree.entropy.statistics import HeadEntropy
from normfree.entropy.support import UnsupportedModel, refusal, without_rows
from normfree.entropy.swap import PASSES, RECORDERS, install, watch

ProbeMethod = Literal["auto", "eager"]
_next_slot = itertools.count()
_NO_SLOT = object()
# A module keeps its number for life: code compiled inside one probe serves the next.
_slots_of: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


class EntropyProbe:
    """Measure every head in each whole forward pass inside the `with`; a recomputed forward counts once.

    ```
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    probe.statistics().mean_nats()    # (L, H), nats
    ```
    method: 'auto' measures through the attention registry, memory linear in the context; 'eager' asks the
        model for its attention matrices (O(T^2) memory), for families that do not use the registry.
    patterns: also measure mean attended distance and the mass on the first token.

    The model may be wrapped (DDP, torch.compile) and in any mode, dtype or autocast; dropout plays no part
    in what is measured. Probes of different models may be nested; a second one on a model is refused.
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
        attend = set(self._modules.values())  # and the modules around them: each may be the one that is called
        self._watched = [part for part in self._model.modules() if not attend.isdisjoint(part.modules())]
        if not self._hooks and not self._modules:
            raise UnsupportedModel(refusal(self._model.config.model_type))
        self._undo: list[Callable[[], None]] = []
        self._names: dict[str, str] = {}

    def __enter__(self) -> EntropyProbe:
        if any(_is_measured(module) for module in self._model.modules()):
            raise ValueError("this model is being measured by another EntropyProbe; leave that one first")
        if self._hooks:
            self._hooks.attach()
            return self
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hooks:
            self._hooks.detach()
            return
        changed = any(self._implementation(self._modules[name]) != used for name, used in self._names.items())
        self._detach()
        if changed and error is None:
            raise ValueError(
                "the attention implementation was changed inside the probe, and what ran after that was not measured; "
                "change it before"
            )

    def statistics(self) -> HeadEntropy:
        """Sums and counts over all whole forward passes so far. Raises ValueError if there was none."""
        if not self._recorder.sums:
            raise ValueError(
                "nothing was measured: call the model inside `with EntropyProbe(model) as probe:`; if you did, its "
                "attention passes the registry by (gpt2 with reorder_and_upcast_attn in eager attention): load it with "
                "attn_implementation='sdpa'"
            )
        return self._recorder.statistics()

    def _attach(self) -> None:
        entries = {}
        for module in self._watched:
            slot = _slots_of.setdefault(module, next(_next_slot))
            PASSES[slot] = self._recorder
            self._undo += [handle.remove for handle in watch(module, slot)]
        for key, module in self._modules.items():
            slot = _slots_of[module]
            RECORDERS[slot] = (self._recorder, cast(int, module.layer_idx), self._patterns)
            setattr(module, SLOT, slot)
            registry = registry_of(module)
            name = self._names[key] = self._implementation(module)
            entries[id(registry), name] = (registry, name)
        for registry, name in entries.values():
            self._undo.append(install(registry, name))

    def _implementation(self, module: nn.Module) -> str:
        return cast(str, getattr(module, "config", self._model.config)._attn_implementation)

    def _detach(self) -> None:
        while self._undo:
            self._undo.pop()()
        for module in self._watched:
            PASSES.pop(_slots_of.get(module, -1), None)
        for module in self._modules.values():
            if hasattr(module, SLOT):
                delattr(module, SLOT)
                RECORDERS.pop(_slots_of[module], None)


def _is_measured(module: nn.Module) -> bool:
    """Whether a probe is at work on this module; a copy that was made inside one bears its number, and is not."""
    slot = getattr(module, SLOT, _NO_SLOT)
    return slot is None or (slot is not _NO_SLOT and _slots_of.get(module) == slot)


def _pretrained(model: nn.Module) -> PreTrainedModel:
    found: dict[str, PreTrainedModel] = {}
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and not any(f"{name}.".startswith(f"{outer}.") for outer in found):
            found[name] = part
        if "" in found:
            break
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} holds several Hugging Face models ({', '.join(found)}): give each a probe"
        )
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} is not a Hugging Face model; load one with AutoModelForCausalLM"
        )
    return next(iter(found.values()))
