"""Running sums of one probe, on the device of the model."""

# B batch, H heads, T query, L layers

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normfree.entropy.request import AttentionEntropy
from normfree.entropy.statistics import HeadEntropy

SLOT = "_normfree_slot"
"""Attribute of a measured attention module, present only inside its probe."""


def is_recomputation() -> bool:
    """True inside a backward pass, where a forward call is the second one of gradient checkpointing.

    torch.utils.checkpoint calls the same private function.
    """
    return torch._C._current_graph_task_id() != -1


class _Pass(threading.local):
    """The current forward pass of this thread: the modules that it is inside of, outermost first, and its sums."""

    def __init__(self) -> None:
        self.inside: list[int] = []
        self.attended: tuple[Tensor | None, ...] = ()
        self.sums: dict[int, dict[str, Tensor]] = {}


@dataclass
class Recorder:
    """Add up attention calls by layer. Sums stay on the device, so recording never synchronises with it.

    A forward pass counts once its outermost module has returned; one that ends in an exception leaves nothing.
    """

    sums: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _slots: dict[int, int] = field(default_factory=dict)
    _pass: _Pass = field(default_factory=_Pass)
    _lock: Any = field(default_factory=threading.Lock)

    def enter(self, slot: int) -> None:
        """Begin the forward call of a module. If it never returned from the last one, that pass is dropped."""
        inside = self._pass.inside
        if not inside or slot in inside:
            inside.clear()
            self._pass.sums = {}
        inside.append(slot)
        self._pass.attended = ()

    def leave(self, slot: int) -> None:
        """End the forward call of a module, and the pass if it is the outermost one."""
        inside = self._pass.inside
        self._pass.attended = ()
        if slot in inside:
            del inside[inside.index(slot) :]
            if not inside:
                self._count()

    def is_repeated(self, *tensors: Tensor | None) -> bool:
        """True if the current module has just attended with these very tensors.

        diffllama does so for each half of its values; both calls are one row for a query and head.
        """

        def places(tensors: tuple[Tensor | None, ...]) -> list[Any]:
            return [None if t is None else (t.data_ptr(), t.shape, t.stride()) for t in tensors]

        before, self._pass.attended = self._pass.attended, tensors if self._pass.inside else ()
        return bool(before) and places(before) == places(tensors)

    def add(self, layer: int, entropies: AttentionEntropy, *, slot: int = 0) -> None:
        """Add the rows of one attention call of the module with this slot.

        Raises ValueError for a second module with the same layer number, whose heads are other heads.
        """
        if self._slots.setdefault(layer, slot) != slot:
            raise ValueError(
                f"two attention modules have the layer number {layer}; probe an encoder or a decoder alone, e.g. "
                "EntropyProbe(model.get_decoder())"
            )
        self._pass.sums = _plus(self._pass.sums, {layer: _sums(entropies)})
        if not self._pass.inside:
            self._count()

    def _count(self) -> None:
        with self._lock:
            self.sums = _plus(self.sums, self._pass.sums)
        self._pass.sums = {}

    def statistics(self) -> HeadEntropy:
        """All whole passes so far, on the CPU."""
        layers = sorted(self.sums)
        heads = [len(self.sums[layer]["rows"]) for layer in layers]
        joined = {}
        for name in self.sums[layers[0]]:
            parts = [self.sums[layer][name].cpu() for layer in layers]
            parts = [part.double() if part.is_floating_point() else part for part in parts]
            if parts[0].dim():
                parts = [torch.nn.functional.pad(part, (0, max(heads) - len(part))) for part in parts]
            joined[name] = torch.stack(parts)
        return HeadEntropy(layers, heads, **joined)


def _plus(sums: dict[int, dict[str, Tensor]], more: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    joined = sums | more
    for layer in sums.keys() & more.keys():  # not in place: one call may be in inference mode
        old, new = sums[layer], more[layer]
        joined[layer] = {name: value + new[name].to(value.device) for name, value in old.items()}
    return joined


def _sums(entropies: AttentionEntropy) -> dict[str, Tensor]:
    wide = torch.float32 if entropies.nats.device.type == "mps" else torch.float64
    seen_BHT, counted_BHT = entropies.visible > 0, entropies.counted

    def over_rows(value_BHT: Tensor) -> Tensor:
        return torch.where(counted_BHT, value_BHT, 0.0).to(wide).sum((0, 2))

    log_visible_BHT = entropies.visible.clamp(min=1).to(wide).log()
    sums = {
        "sum_nats": over_rows(entropies.nats),
        "rows": counted_BHT.sum((0, 2)),
        "nonfinite_rows": (seen_BHT & ~counted_BHT).sum((0, 2)),
        "sum_ceiling_nats": torch.where(counted_BHT, log_visible_BHT, 0.0).sum(),
        "ceiling_rows": counted_BHT.sum(),
    }
    if entropies.distance is not None and entropies.first_mass is not None:
        sums["sum_distance"] = over_rows(entropies.distance)
        sums["sum_first_mass"] = over_rows(entropies.first_mass)
    return sums
