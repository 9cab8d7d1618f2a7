"""AttentionTap: show every attention call of a model to a reader, through the attention registry of transformers.

Inside a tap the entry of the registry is one that shows the call and then calls the original. The entry and its
operators know only a slot number on the module, so that a compiled model stays compiled from one tap to the next: who
reads a slot is looked up when the operator runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, library, nn
from torch._dynamo.eval_frame import skip_code

from normfree.entropy.routing import AttentionCall, eager_function, read_call, registry_of, routed_attention
from normfree.entropy.support import UnsupportedModel, refusal

Reader = Callable[[int, AttentionCall], None]  # takes the number of a layer and one of its attention calls
Watcher = Callable[[int, bool], None]  # takes the slot of a module, and whether its forward call begins
SLOT = "_normfree_slot"  # attribute of an attention module, present only inside its taps

_readers: dict[int, list[Callable[[AttentionCall], None]]] = {}  # by slot, the id of a module
_watchers: dict[int, Watcher] = {}
_replaced = ExitStack()
# A compiler would drop an operator that changes nothing; these claim to write here.
_ticket = torch.zeros(())


class AttentionTap:
    """Call a reader at every attention call of a model inside the `with`; the registry is as before outside.

    Taps may be nested. Calls that gradient checkpointing repeats are not shown again. Raises UnsupportedModel (a
    ValueError) for a model that does not route its attention through the registry of transformers.
    """

    def __init__(self, model: Any, read: Reader) -> None:
        self.modules: list[Any] = routed_attention(model)
        if not self.modules:
            raise UnsupportedModel(refusal(model.config.model_type))
        self._model, self._read = model, read

    def __enter__(self) -> Self:
        self._slot_of_layer: dict[int, int] = {}
        self._used = list(map(self._implementation, self.modules))
        with ExitStack() as attached:
            for module, name in zip(self.modules, self._used, strict=True):
                attached.enter_context(_shown_to(functools.partial(self._pass_on, module.layer_idx), module))
                _replace_entry(registry_of(module), name)
            self._attached = attached.pop_all()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        changed = self._used != list(map(self._implementation, self.modules))
        self._attached.close()
        if changed and error is None:
            raise ValueError("the attention implementation was changed inside the probe; change it before")

    def _implementation(self, module: Any) -> str:
        return getattr(module, "config", self._model.config)._attn_implementation

    def _pass_on(self, layer: int, slot: int, call: AttentionCall) -> None:
        if self._slot_of_layer.setdefault(layer, slot) != slot:
            raise ValueError(
                f"two attention modules have the layer number {layer}; probe an encoder or a decoder alone, e.g. "
                "EntropyProbe(model.get_decoder())"
            )
        self._read(layer, call)


@contextmanager
def _shown_to(read: Callable[[int, AttentionCall], None], module: nn.Module) -> Iterator[None]:
    """Show the calls of one attention module to a function of the slot and the call."""
    slot = id(module)
    reader = functools.partial(read, slot)
    _readers.setdefault(slot, []).append(reader)
    setattr(module, SLOT, slot)
    try:
        yield
    finally:
        _readers[slot].remove(reader)
        if not _readers[slot]:
            del _readers[slot]
            delattr(module, SLOT)
        if not _readers:
            _replaced.close()


def _replace_entry(registry: Any, name: str) -> None:
    """Replace an entry of a registry by one that shows the call, until there is no reader left."""
    original = registry.get(name)
    if hasattr(original, "shows_calls"):
        return

    def restore() -> None:
        del registry[name]
        if original is not None and registry.get(name) is not original:
            registry[name] = original  # the registry had an entry of its own

    # Item assignment covers the mapping that registries share, for this registry; deletion uncovers it again.
    registry[name] = _showing(name, original)
    _replaced.callback(restore)


@functools.cache
def _showing(name: str, original: Callable[..., Any] | None) -> Callable[..., Any]:
    # Cached: the same function object in every tap, so that compiled code stays valid.
    def shown_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **named: Any
    ) -> Any:
        slot = getattr(module, SLOT, None)
        if slot is not None:
            with torch.no_grad():
                call = read_call(name, module, query, key, attention_mask, named)
                torch.ops.normfree.show_call(_ticket, slot, *call)
        attend = original if original is not None else eager_function(type(module))
        return attend(module, query, key, value, attention_mask, *args, **named)

    shown_attention.shows_calls = True
    return shown_attention


# From `q` on, the fields of AttentionCall in their order.
@library.custom_op("normfree::show_call", mutates_args={"ticket"}, tags=(torch.Tag.cudagraph_unsafe,))
def _show_call(
    ticket: Tensor,
    slot: int,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    chunked: bool,
    forgets_first: bool,
    own_keys: int,
    positions: Tensor | None,
) -> None:
    if slot not in _readers or is_recomputation():
        return
    facts = (causal, window, softcap, chunked, forgets_first, own_keys, positions)
    call = AttentionCall(q.detach(), k.detach(), mask, sinks, scale, *facts)
    with torch.no_grad():
        for read in _readers[slot]:
            read(call)


@contextmanager
def watched(module: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Tell the watcher when a forward call of the module begins and when it returns."""
    slot = id(module)
    begin, end = (functools.partial(_cross, slot, begins) for begins in (True, False))
    handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    _watchers[slot] = watcher
    try:
        yield
    finally:
        del _watchers[slot]
        for handle in handles:
            handle.remove()


def _cross(slot: int, begins: bool, *_: Any) -> None:
    torch.ops.normfree.cross_module(_ticket, slot, begins)  # an operator: a compiler keeps their order


skip_code(_cross.__code__)  # around a compiled module it runs as it is, instead of being compiled by itself


@library.custom_op("normfree::cross_module", mutates_args={"ticket"}, tags=(torch.Tag.cudagraph_unsafe,))
def _cross_module(ticket: Tensor, slot: int, begins: bool) -> None:
    if slot in _watchers and not is_recomputation():
        _watchers[slot](slot, begins)


@_show_call.register_fake
@_cross_module.register_fake
def _(*arguments):
    return None


def is_recomputation() -> bool:
    """True inside a backward pass, where a forward call is the second one of gradient checkpointing.

    torch.utils.checkpoint calls the same private function.
    """
    return torch._C._current_graph_task_id() != -1
