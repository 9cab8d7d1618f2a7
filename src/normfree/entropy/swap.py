"""The measuring entry of an attention registry, and the operator that records one attention call.

The entry and the operator know only a slot number on the module, so that a compiled model stays compiled
from one probe to the next: what a slot means is looked up when the operator runs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, library, nn
from torch._dynamo.eval_frame import skip_code
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import AttentionInterface

from normfree.entropy.functional import attention_entropy
from normfree.entropy.recorder import SLOT, Recorder, is_recomputation
from normfree.entropy.routing import eager_function, scores_asked
from normfree.entropy.support import UnsupportedModel
from normfree.entropy.visibility import last_key_is_hidden, padding_rows

RECORDERS: dict[int, tuple[Recorder, int, bool]] = {}
"""slot -> where to add, the layer's index, whether patterns are wanted."""

PASSES: dict[int, Recorder] = {}
"""slot of an attention module, or of one around it -> the recorder whose passes go through it."""

_covered: dict[tuple[int, str], _Covered] = {}
# An operator that changes nothing would be dropped by a compiler; this one claims to write here.
_ticket = torch.zeros(())


@dataclass
class _Covered:
    """A registry entry that is measured: what it stood for, and how many probes are inside."""

    original: Callable[..., Any] | None
    probes: int = 0


def install(registry: AttentionInterface, name: str) -> Callable[[], None]:
    """Put the measuring entry over `name`; the answer undoes it. Probes of one entry are counted."""
    key = (id(registry), name)
    if key not in _covered:
        _covered[key] = _Covered(registry.get(name))
        # Item assignment covers the shared mapping for this registry; deletion uncovers it again.
        registry[name] = _measuring(name, _covered[key].original)
    covered = _covered[key]
    covered.probes += 1

    def undo() -> None:
        covered.probes -= 1
        if covered.probes:
            return
        del _covered[key], registry[name]
        if covered.original is not None and registry.get(name) is not covered.original:
            registry[name] = covered.original  # the registry had an entry of its own

    return undo


@functools.cache
def _measuring(name: str, original: Callable[..., Any] | None) -> Callable[..., Any]:
    # Cached: the same function object at every probe, so that compiled code stays valid.
    def measured_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **asked: Any,
    ) -> Any:
        slot = getattr(module, SLOT, None)
        if slot is not None:
            scores = scores_asked(name, module, query, key, attention_mask, asked)
            key_seen, mask, sinks = scores["k"].detach(), scores["mask"], scores["sinks"]
            torch.ops.normfree.record_entropy(
                _ticket, query.detach(), key_seen, None if mask is None else mask.detach(), sinks,
                scores["scale"], scores["causal"], scores["window"], scores["softcap"], slot,
                scores["forgets_first"], scores["chunked"], scores["own_keys"], scores["positions"],
            )  # fmt: skip
        attend = original if original is not None else eager_function(type(module))
        return attend(module, query, key, value, attention_mask, *args, **asked)

    return measured_attention


def watch(module: nn.Module, slot: int) -> list[RemovableHandle]:
    """Tell the recorder when a forward call of the module begins and when it has returned."""

    enter, leave = (functools.partial(_cross, slot, enters) for enters in (True, False))
    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _cross(slot: int, enters: bool, *_: Any) -> None:
    torch.ops.normfree.cross_module(_ticket, slot, enters)  # an operator: a compiler keeps their order


skip_code(_cross.__code__)  # around a compiled module it runs as it is, instead of being compiled by itself


@library.custom_op("normfree::cross_module", mutates_args={"ticket"}, tags=(torch.Tag.cudagraph_unsafe,))
def _cross_module(ticket: Tensor, slot: int, enters: bool) -> None:
    if slot in PASSES and not is_recomputation():
        if not enters:
            PASSES[slot].leave(slot)
            return
        frame = sys._getframe()
        while frame is not None and frame.f_code is not _cross.__code__:
            frame = frame.f_back
        PASSES[slot].enter(slot, frame and frame.f_back)  # whoever called the hook


@_cross_module.register_fake
def _(ticket, slot, enters):
    return None


def _begins_anew(visible_BHT: Tensor) -> bool:
    """Whether a row sees one key and the row before it is no padding, so that a text begins in the middle."""
    return bool(((visible_BHT[..., 1:] == 1) & (visible_BHT[..., :-1] > 0)).any())


@library.custom_op("normfree::record_entropy", mutates_args={"ticket"}, tags=(torch.Tag.cudagraph_unsafe,))
def _record(
    ticket: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    slot: int,
    forgets_first: bool,
    chunked: bool,
    own_keys: int,
    positions: Tensor | None,
) -> None:
    if slot not in RECORDERS or is_recomputation():
        return
    recorder, layer, patterns = RECORDERS[slot]
    if recorder.attends_again(q, k, mask):
        return
    queries, keys = q.shape[2], k.shape[2]
    if positions is not None and bool((positions.diff(dim=-1) != 1).any()):
        raise UnsupportedModel(
            "flash attention was called on texts packed into one row, which only position_ids tell apart: not read "
            "here; load the model with attn_implementation='sdpa'"
        )
    if patterns and own_keys != keys:
        raise ValueError(
            f"layer {layer} puts compressed keys behind those of the tokens, so distances and the mass on the first "
            "token are unknown here; leave out patterns=True"
        )
    if patterns and forgets_first and queries < keys:
        raise ValueError(
            f"layer {layer} has a sliding window, whose cache forgets the first token: the mass on it is unknown here; "
            "call the model on whole sequences (use_cache=False), or leave out patterns=True"
        )
    if patterns and queries < keys and last_key_is_hidden(mask):
        raise ValueError(
            "a static cache has room behind the newest token, so distances to it are unknown here; use a dynamic cache "
            "or whole sequences (use_cache=False), or leave out patterns=True"
        )
    both = torch.promote_types(q.dtype, k.dtype)  # under autocast some models rotate queries alone in fp32
    with torch.no_grad():
        measured = attention_entropy(
            q.to(both),
            k.to(both),
            causal=causal,
            scale=scale,
            mask=mask,
            window=window,
            softcap=softcap,
            sinks=sinks,
            patterns=patterns,
        )
        padded = padding_rows(None if mask is None else mask[..., :own_keys], queries, own_keys)
        if padded is not None:
            measured = replace(measured, visible=measured.visible.masked_fill(padded, 0))
        if patterns and not chunked and _begins_anew(measured.visible):
            raise ValueError(
                "a row behind another sees nothing but itself, as where texts are packed into one: the mass on the "
                "first token of each is unknown here; call the model on a padded batch, or leave out patterns=True"
            )
        recorder.add(layer, measured, slot=slot)


@_record.register_fake
def _(ticket, q, k, mask, sinks, scale, causal, window, softcap, slot, forgets_first, chunked, own_keys, positions):
    return None
