"""Running sums of one probe, on the device of the model."""

# B batch, H heads, T query, L layers

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class Recorder:
    """Adds calls up by layer. Sums stay on the device, so that recording waits for nothing."""

    sums: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _slots: dict[int, int] = field(default_factory=dict)

    def add(self, layer: int, measured: AttentionEntropy, *, slot: int = 0) -> None:
        """Add the rows of one attention call; `slot` says of which module. Raises ValueError for a second module that
        has the same layer index: its heads are other heads."""
        if self._slots.setdefault(layer, slot) != slot:
            raise ValueError(
                f"two attention modules call themselves layer {layer} (an encoder and a decoder, or parts side by "
                "side); probe one part alone, of an encoder and a decoder EntropyProbe(model.get_decoder())"
            )
        new = _sums(measured)
        old = self.sums.get(layer)
        if old is None:
            self.sums[layer] = new
            return
        for name, value in new.items():
            old[name] = old[name] + value.to(old[name].device)  # not in place: one call may be in inference mode

    def statistics(self) -> HeadEntropy:
        """Everything so far, on the CPU."""
        layers = sorted(self.sums)
        heads = [len(self.sums[layer]["rows"]) for layer in layers]
        joined = {name: self._join(name, max(heads)) for name in self.sums[layers[0]]}
        return HeadEntropy(layers, heads, **joined)

    def _join(self, name: str, heads: int) -> Tensor:
        dtype = torch.int64 if name in COUNTS else torch.float64
        parts = [self.sums[layer][name].cpu().to(dtype) for layer in sorted(self.sums)]
        padded = [torch.nn.functional.pad(part, (0, heads - len(part))) if part.dim() else part for part in parts]
        return torch.stack(padded)


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
