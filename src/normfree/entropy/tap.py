"""AttentionTap: show every attention call of a model to a reader, through the attention registry of transformers.

Inside a tap the entry of the registry is one that shows the call and then calls the original. The entry and its
operator know only a slot number on the module, so that a compiled model stays compiled from one tap to the next: who
reads a slot is looked up when the operator runs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, library, nn

from normfree.entropy.layers import HeadLayer, attention_layers
from normfree.entropy.routing import AttentionCall, global_named, read_call, registry_of
from normfree.entropy.support import UnsupportedModel
from normfree.entropy.visibility import padding_rows

SLOT = "_normfree_slot"  # attribute of an attention module, present only inside its taps
EDITS = "_normfree_edits"  # inside interventions: functions of a call, its values and what the original returned

_taps: dict[int, list[AttentionTap]] = {}  # by slot, the id of an attention module
_replaced = ExitStack()
# A compiler would drop an operator that changes nothing; ours claims to write here.
_ticket = torch.zeros(())


class AttentionTap:
    """Call `read(layer, call)` at every attention call of a model inside the `with`; the registry is restored after it.

    Taps may be nested. Calls that gradient checkpointing repeats are not shown again. Raises UnsupportedModel (a
    ValueError) for a model that does not route its attention through the registry.
    """

    def __init__(self, model: Any, read: Callable[[HeadLayer, AttentionCall], None]) -> None:
        layers = attention_layers(model)
        self.modules: list[Any] = list(layers)
        if not layers:
            raise UnsupportedModel(
                f"{model.config.model_type} does not route all heads through AttentionInterface; pass method='eager' "
                "(O(T^2) memory)"
            )
        self._model, self._read = model, read
        self._layers = {id(module): layer for module, layer in layers.items()}
        self._paddings = threading.local()  # by stack, of the newest self-attention: the queries, and which are padding

    def __enter__(self) -> Self:
        for module in self.modules:
            setattr(module, SLOT, id(module))
            _taps.setdefault(id(module), []).append(self)
            name = getattr(module, "config", self._model.config)._attn_implementation
            _replace_entry(registry_of(type(module)), name)
        return self

    def __exit__(self, *_: object) -> None:
        self._paddings = threading.local()
        for module in self.modules:
            _taps[id(module)].remove(self)
            if not _taps[id(module)]:
                del _taps[id(module)]
                delattr(module, SLOT)
        if not _taps:
            _replaced.close()

    def show(self, slot: int, call: AttentionCall) -> None:
        """Pass a call on to the reader, with its padded queries."""
        layer = self._layers[slot]
        if "padded" not in vars(call):
            call.padded = self._padded_queries(layer, call)
        self._read(layer, call)

    def _padded_queries(self, layer: HeadLayer, call: AttentionCall) -> Tensor | None:
        """The mask of cross-attention says nothing of its queries: they are those of the self-attention before it."""
        if layer.is_cross:
            queries, padded = vars(self._paddings).get(layer.stack, (0, None))
            return padded if queries == call.q.shape[2] else None
        own_mask = None if call.mask is None else call.mask[..., : call.own_keys]
        padded = padding_rows(own_mask, call.q.shape[2], call.own_keys)
        # A bias by head gives one mask a head; any of them tells.
        vars(self._paddings)[layer.stack] = (call.q.shape[2], None if padded is None else padded[:, :1])
        return padded


def _replace_entry(registry: Any, name: str) -> None:
    """Replace an entry of a registry by one that shows the call, until no tap is open."""
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
        call = None
        if slot == id(module):  # a copy of the module has the number of the original
            with torch.no_grad():
                call = read_call(name, module, query, key, attention_mask, named)
                torch.ops.normfree.show_call(_ticket, slot, *call)
        attend = original if original is not None else global_named(type(module), "eager_attention_forward")
        result = attend(module, query, key, value, attention_mask, *args, **named)
        if call is not None:
            own_value = named["before_sink"][2] if "before_sink" in named else value  # as in read_call
            for edit in getattr(module, EDITS, ()):
                result = edit(call, own_value, result)
        return result

    vars(shown_attention)["shows_calls"] = True
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
    if slot not in _taps or is_recomputation():
        return
    facts = (causal, window, softcap, chunked, forgets_first, own_keys, positions)
    call = AttentionCall(q.detach(), k.detach(), mask, sinks, scale, *facts)
    with torch.no_grad():
        for tap in _taps[slot]:
            tap.show(slot, call)


@_show_call.register_fake
def _(*arguments):
    return None


def is_recomputation() -> bool:
    """True inside a backward pass, where a forward call repeats one, as torch.utils.checkpoint itself finds out."""
    return torch._C._current_graph_task_id() != -1
