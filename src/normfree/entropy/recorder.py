"""Running sums of one probe, on the device of the model."""

# B batch, H heads, T query, L layers

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from normfree.entropy.functional import AttentionEntropy
from normfree.entropy.statistics import HeadEntropy

SLOT = "_normfree_slot"
"""Attribute of a measured module, present only inside its probe."""

COUNTS = ("rows", "nonfinite_rows", "ceiling_rows")


def is_recomputation() -> bool:
    """Whether a backward pass is under way: then a forward call is gradient checkpointing's second one.

    torch.utils.checkpoint asks the same private function; tests run both of its kinds.
    """
    return torch._C._current_graph_task_id() != -1


class _Pass(threading.local):
    """The forward pass under way in this thread: the modules it is inside of, outermost first, and its sums."""

    def __init__(self) -> None:
        self.inside: list[int] = []
        self.frame: FrameType | None = None
        self.attended: tuple[Tensor | None, ...] = ()
        self.sums: dict[int, dict[str, Tensor]] = {}


@dataclass
class Recorder:
    """Adds calls up by layer. Sums stay on the device, so that recording waits for nothing.

    A forward pass counts once its outermost module has returned; one that ends in an exception leaves nothing.
    """

    sums: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _slots: dict[int, int] = field(default_factory=dict)
    _pass: _Pass = field(default_factory=_Pass)
    _lock: Any = field(default_factory=threading.Lock)

    def enter(self, slot: int, frame: FrameType | None = None) -> None:
        """Begin a module's forward call, `frame` where Python runs it: a pass whose frame is gone has ended in an
        exception, also one in compiled code (without a frame) that seems to enter a module twice."""
        inside = self._pass.inside
        if not inside or slot in inside or not _is_running(self._pass.frame):
            inside.clear()
            self._pass.sums, self._pass.frame = {}, frame
        inside.append(slot)
        self._pass.attended = ()

    def leave(self, slot: int) -> None:
        """End a module's forward call, and with the outermost one the pass."""
        inside = self._pass.inside
        self._pass.attended = ()
        if slot in inside:
            del inside[inside.index(slot) :]
            if not inside:
                self._pass.frame = None
                self._count()

    def attends_again(self, *tensors: Tensor | None) -> bool:
        """Whether the module under way has just attended with these very tensors: diffllama does for each half of its
        values, and that is one row for a query and head."""
        before, self._pass.attended = self._pass.attended, tensors if self._pass.inside else ()
        return bool(before) and [_place(tensor) for tensor in before] == [_place(tensor) for tensor in tensors]

    def add(self, layer: int, measured: AttentionEntropy, *, slot: int = 0) -> None:
        """Add the rows of one attention call; `slot` says of which module. Raises ValueError for a second module that
        has the same layer index: its heads are other heads."""
        if self._slots.setdefault(layer, slot) != slot:
            raise ValueError(
                f"two attention modules call themselves layer {layer} (an encoder and a decoder, or parts side by "
                "side); probe one part alone, of an encoder and a decoder EntropyProbe(model.get_decoder())"
            )
        self._pass.sums = _plus(self._pass.sums, {layer: _sums(measured)})
        if not self._pass.inside:
            self._count()

    def _count(self) -> None:
        with self._lock:
            self.sums = _plus(self.sums, self._pass.sums)
        self._pass.sums = {}

    def statistics(self) -> HeadEntropy:
        """All whole passes so far, on the CPU."""
        sums = dict(sorted(self.sums.items()))
        heads = [len(layer["rows"]) for layer in sums.values()]
        names = next(iter(sums.values()))
        joined = {name: _join([layer[name] for layer in sums.values()], name, max(heads)) for name in names}
        return HeadEntropy(list(sums), heads, **joined)


def _place(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride())


def _is_running(frame: FrameType | None) -> bool:
    """Whether this thread is inside of the frame; None, which says nothing, counts as running."""
    current = sys._getframe()
    while current is not None and current is not frame:
        current = current.f_back
    return current is frame


def _plus(sums: dict[int, dict[str, Tensor]], more: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    joined = sums | more
    for layer in sums.keys() & more.keys():  # not in place: one call may be in inference mode
        old, new = sums[layer], more[layer]
        joined[layer] = {name: value + new[name].to(value.device) for name, value in old.items()}
    return joined


def _join(parts: list[Tensor], name: str, heads: int) -> Tensor:
    dtype = torch.int64 if name in COUNTS else torch.float64
    parts = [part.cpu().to(dtype) for part in parts]
    return torch.stack(
        [torch.nn.functional.pad(part, (0, heads - len(part))) if part.dim() else part for part in parts]
    )


def _sums(measured: AttentionEntropy) -> dict[str, Tensor]:
    wide = torch.float32 if measured.nats.device.type == "mps" else torch.float64
    seen_BHT, counted_BHT = measured.visible > 0, measured.counted

    def over_rows(value_BHT: Tensor) -> Tensor:
        return torch.where(counted_BHT, value_BHT, 0.0).to(wide).sum((0, 2))

    log_visible_BHT = measured.visible.clamp(min=1).to(wide).log()
    sums = {
        "sum_nats": over_rows(measured.nats),
        "rows": counted_BHT.sum((0, 2)),
        "nonfinite_rows": (seen_BHT & ~counted_BHT).sum((0, 2)),
        "sum_ceiling_nats": torch.where(counted_BHT, log_visible_BHT, 0.0).sum(),
        "ceiling_rows": counted_BHT.sum(),
    }
    if measured.distance is not None and measured.first_mass is not None:
        sums["sum_distance"] = over_rows(measured.distance)
        sums["sum_first_mass"] = over_rows(measured.first_mass)
    return sums
