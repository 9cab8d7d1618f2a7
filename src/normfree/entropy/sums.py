"""Running sums over the rows of attention calls, on the device of the model."""

# B batch, H heads, T query, L layers

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from normfree.entropy.layers import HeadLayer, labels
from normfree.entropy.request import AttentionEntropy
from normfree.entropy.statistics import HeadEntropy

Sums = dict[str, Tensor]


class HeadSums:
    """Sums by layer. They stay on the device, so adding never synchronises with it; threads may add at once."""

    def __init__(self) -> None:
        self._sums: dict[HeadLayer, Sums] = {}
        self._lock = threading.Lock()

    def add(self, calls: Iterable[tuple[HeadLayer, Sums]]) -> None:
        """Add `sums_of` attention calls, each with its layer."""
        with self._lock:
            for layer, new in calls:
                old = self._sums.get(layer)
                # Not in place: one of the calls may be in inference mode.
                joined = (
                    new if old is None else {name: value + new[name].to(value.device) for name, value in old.items()}
                )
                self._sums[layer] = joined

    def statistics(self) -> HeadEntropy:
        """Everything that was added, on the CPU. Raises ValueError if that is nothing."""
        if not self._sums:
            raise ValueError(
                "No forward pass ran inside the `with` block. If one did, the model's attention bypasses the registry: "
                "load it with attn_implementation='sdpa'"
            )
        layers = sorted(self._sums)
        heads = [len(self._sums[layer]["rows"]) for layer in layers]
        joined = {}
        for name in self._sums[layers[0]]:
            parts = [self._sums[layer][name].cpu() for layer in layers]
            parts = [part.double() if part.is_floating_point() else part for part in parts]
            if parts[0].dim():
                parts = [torch.nn.functional.pad(part, (0, max(heads) - len(part))) for part in parts]
            joined[name] = torch.stack(parts)
        return HeadEntropy(labels(layers), heads, **joined)


def sums_of(entropies: AttentionEntropy) -> Sums:
    """Sums over the rows of one attention call, by the fields of HeadEntropy."""
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
