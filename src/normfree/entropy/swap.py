"""Replace entries of an attention registry, to record attention calls (EntropyProbe) or to read them (AttentionTap).

The recording entry and its operator know only a slot number on the module, so that a compiled model stays compiled from
one probe to the next: what a slot means is looked up when the operator runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, library, nn
from torch._dynamo.eval_frame import skip_code
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import AttentionInterface

from normfree.entropy.functional import as_4d, as_request, attention_entropy
from normfree.entropy.recorder import SLOT, Recorder, is_recomputation
from normfree.entropy.request import Request
from normfree.entropy.routing import eager_function, read_call, registry_of, routed_attention, without_sink_key
from normfree.entropy.support import UnsupportedModel, refusal
from normfree.entropy.visibility import last_key_is_hidden, padding_rows

RECORDERS: dict[int, tuple[Recorder, int, bool]] = {}
"""slot of an attention module, or of one around it -> recorder, number of the layer, whether patterns are measured."""

_installed: dict[tuple[int, str], _Installed] = {}
# A compiler would drop an operator that changes nothing; this one claims to write here.
_ticket = torch.zeros(())


@dataclass
class _Installed:
    undo: Callable[[], None]
    probes: int = 0


def replace_entry(
    registry: AttentionInterface, name: str, wrap: Callable[[Callable[..., Any] | None], Callable[..., Any]]
) -> Callable[[], None]:
    """Replace an entry of a registry by `wrap` of it, and return a function that undoes this."""
    original = registry.get(name)
    # Item assignment covers the mapping that registries share, for this registry; deletion uncovers it again.
    registry[name] = wrap(original)

    def undo() -> None:
        del registry[name]
        if original is not None and registry.get(name) is not original:
            registry[name] = original  # the registry had an entry of its own

    return undo


def install(registry: AttentionInterface, name: str) -> Callable[[], None]:
    """Replace an entry by one that measures, and return a function that undoes this. Probes share the entry."""
    key = (id(registry), name)
    if key not in _installed:
        _installed[key] = _Installed(replace_entry(registry, name, functools.partial(_measuring, name)))
    installed = _installed[key]
    installed.probes += 1

    def undo() -> None:
        installed.probes -= 1
        if not installed.probes:
            del _installed[key]
            installed.undo()

    return undo


@functools.cache
def _measuring(name: str, original: Callable[..., Any] | None) -> Callable[..., Any]:
    # Cached: the same function object at every probe, so that compiled code stays valid.
    def measured_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **named: Any
    ) -> Any:
        slot = getattr(module, SLOT, None)
        if slot is not None:
            with torch.no_grad():
                q, k, mask = without_sink_key(query, key, attention_mask, named)
                torch.ops.normfree.record_entropy(_ticket, slot, q, *read_call(name, module, q, k, mask, named))
        attend = original if original is not None else eager_function(type(module))
        return attend(module, query, key, value, attention_mask, *args, **named)

    return measured_attention


def watch(module: nn.Module, slot: int) -> list[RemovableHandle]:
    """Tell the recorder of a slot when a forward call of the module begins and when it returns."""
    enter, leave = (functools.partial(_cross, slot, enters) for enters in (True, False))
    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _cross(slot: int, enters: bool, *_: Any) -> None:
    torch.ops.normfree.cross_module(_ticket, slot, enters)  # an operator: a compiler keeps their order


skip_code(_cross.__code__)  # around a compiled module it runs as it is, instead of being compiled by itself


@library.custom_op("normfree::cross_module", mutates_args={"ticket"}, tags=(torch.Tag.cudagraph_unsafe,))
def _cross_module(ticket: Tensor, slot: int, enters: bool) -> None:
    if slot in RECORDERS and not is_recomputation():
        recorder, _, _ = RECORDERS[slot]
        (recorder.enter if enters else recorder.leave)(slot)


@_cross_module.register_fake
def _(ticket, slot, enters):
    return None


# From `k` on, the fields of AttentionCall in their order.
@library.custom_op("normfree::record_entropy", mutates_args={"ticket"}, tags=(torch.Tag.cudagraph_unsafe,))
def _record(
    ticket: Tensor,
    slot: int,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    chunked: bool,
    forgets_first: bool,
    own_keys: int,
    positions: Tensor | None,
) -> None:
    if slot not in RECORDERS or is_recomputation():
        return
    recorder, layer, patterns = RECORDERS[slot]
    if recorder.is_repeated(q.detach(), k.detach(), mask):
        return
    if positions is not None and bool((positions.diff(dim=-1) != 1).any()):
        raise UnsupportedModel("flash attention on several texts in one row: load with attn_implementation='sdpa'")
    queries, keys = q.shape[2], k.shape[2]
    if patterns:
        _check_first_token(layer, queries, keys, mask, forgets_first, own_keys)
    both = torch.promote_types(q.dtype, k.dtype)  # under autocast some models rotate queries alone in fp32
    with torch.no_grad():
        entropies = attention_entropy(
            q.to(both), k.to(both), causal=causal, scale=scale, mask=mask, window=window, softcap=softcap,
            sinks=sinks, patterns=patterns,
        )  # fmt: skip
        padded = padding_rows(None if mask is None else mask[..., :own_keys], queries, own_keys)
        if padded is not None:
            entropies = replace(entropies, visible=entropies.visible.masked_fill(padded, 0))
        visible = entropies.visible
        # A row that sees one key behind a row that is no padding: a second text begins.
        if patterns and not chunked and bool(((visible[..., 1:] == 1) & (visible[..., :-1] > 0)).any()):
            raise ValueError("several texts are packed into one row; give a padded batch, or leave out patterns=True")
        recorder.add(layer, entropies, slot=slot)


@_record.register_fake
def _(ticket, slot, q, k, mask, sinks, scale, causal, window, softcap, chunked, forgets_first, own_keys, positions):
    return None


def _check_first_token(
    layer: int, queries: int, keys: int, mask: Tensor | None, forgets_first: bool, own_keys: int
) -> None:
    """Raise ValueError if the distances of the keys or the first token are unknown."""
    if own_keys != keys:
        raise ValueError(f"layer {layer} appends compressed keys, whose distance is unknown; leave out patterns=True")
    if queries < keys and forgets_first:
        raise ValueError(f"the cache of layer {layer} forgets the first token: use none, or leave out patterns=True")
    if queries < keys and last_key_is_hidden(mask):
        raise ValueError("distances are unknown in a static cache; use a dynamic one, or leave out patterns=True")


Reader = Callable[[int, Request], None]
"""Takes the number of a layer and one of its attention calls."""


class AttentionTap:
    """Call a reader at every attention call of a model inside the `with`; the registry is as before outside.

    Taps may be nested, with each other and with an EntropyProbe. Raises UnsupportedModel (a ValueError) for a model
    that does not route its attention through the registry of transformers.
    """

    def __init__(self, model: nn.Module, read: Reader) -> None:
        self._modules = set(routed_attention(model).values())
        if not self._modules:
            raise UnsupportedModel(refusal(cast(Any, model).config.model_type))
        if len({cast(Any, module).layer_idx for module in self._modules}) < len(self._modules):
            raise UnsupportedModel("an encoder and a decoder number their layers alike; give one part alone")
        self._read = cast(Reader, torch.compiler.disable(read))
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> AttentionTap:
        entries = {}
        for module in self._modules:
            registry = cast(AttentionInterface, registry_of(module))
            entries[id(registry), cast(Any, module).config._attn_implementation] = registry
        for (_, name), registry in entries.items():
            self._undo.append(replace_entry(registry, name, functools.partial(self._tapped, name)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _tapped(self, name: str, original: Callable[..., Any] | None) -> Callable[..., Any]:
        def tapped_attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **named: Any
        ) -> Any:
            if module in self._modules:
                with torch.no_grad():
                    q, k, mask = without_sink_key(query, key, attention_mask, named)
                    call = read_call(name, module, q, k, mask, named)
                    request = as_request(q, call.k, as_4d(call.mask, q, call.k), *call[2:7], patterns=False)
                    self._read(cast(Any, module).layer_idx, request)
            attend = original if original is not None else eager_function(type(module))
            return attend(module, query, key, value, attention_mask, *args, **named)

        return tapped_attention
