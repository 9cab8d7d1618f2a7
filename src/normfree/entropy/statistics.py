"""HeadEntropy: sums and counts per layer and head, added up on the model's device and divided at the end."""

# B batch, T query, L measured layers, H heads of the widest layer

from __future__ import annotations

import threading
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from normfree.entropy.layers import HeadLayer, labels
from normfree.entropy.request import AttentionEntropy


@dataclass(frozen=True, eq=False)
class HeadEntropy:
    """Entropy of attention heads over any number of batches.

    A row is one query of one sequence. It counts if it sees a key and its entropy is finite; the first row, whose
    entropy is always 0, counts too, as in the paper. Non-finite rows are counted apart, never as 0.

    Sums are float64, rows int64, both (L, H); those of the ceiling, ln(visible keys), are over all heads, (L,). Where
    layers differ in `heads`, H is the largest number and the missing heads have no rows (mean NaN). `layers` are
    numbers (hybrid models skip some), or `encoder 0`, `cross 0` in a model with several groups of heads.
    """

    layers: list[int | str]
    heads: list[int]
    sum_nats: Tensor
    rows: Tensor
    nonfinite_rows: Tensor
    sum_ceiling_nats: Tensor
    ceiling_rows: Tensor
    sum_distance: Tensor | None = None  # in tokens; with EntropyProbe(patterns=True)
    sum_first_mass: Tensor | None = None

    def mean_nats(self) -> Tensor:
        """(L, H) float64: mean entropy of each head in nats; NaN for a head with no finite row."""
        return self._mean("sum_nats")

    def ceiling_nats(self) -> Tensor:
        """(L,) float64: mean of ln(visible keys), the entropy of uniform attention; NaN without a finite row."""
        return self.sum_ceiling_nats / self.ceiling_rows

    def mean_distance(self) -> Tensor:
        """(L, H) float64: mean distance in tokens from a query to where it attends."""
        return self._mean("sum_distance")

    def mean_first_mass(self) -> Tensor:
        """(L, H) float64: mean probability on the first real token (attention sink)."""
        return self._mean("sum_first_mass")

    def to_frame(self) -> pd.DataFrame:
        """One row a head: its entropy, ceiling and rows and, with patterns, distance and mass on the first token."""
        columns = {"entropy_nats": self.mean_nats(), "ceiling_nats": self.ceiling_nats()[:, None].expand_as(self.rows)}
        if self.sum_distance is not None:
            columns |= {"distance_tokens": self.mean_distance(), "first_token_mass": self.mean_first_mass()}
        columns |= {"rows": self.rows, "nonfinite_rows": self.nonfinite_rows}
        index = pd.MultiIndex.from_product([self.layers, range(self.rows.shape[1])], names=["layer", "head"])
        flat = {name: value.flatten().numpy() for name, value in columns.items()}
        exists_LH = torch.arange(self.rows.shape[1]) < torch.tensor(self.heads)[:, None]
        return pd.DataFrame(flat, index=index).reset_index().loc[exists_LH.flatten().numpy()]

    def __repr__(self) -> str:
        return self.to_frame().to_string(max_rows=40)

    def __add__(self, other: HeadEntropy) -> HeadEntropy:
        """Merge two measurements of the same heads over different rows."""
        names, others = self._tensors(), other._tensors()
        if (self.layers, self.heads, names.keys()) != (other.layers, other.heads, others.keys()):
            raise ValueError("cannot merge: both must come from one architecture, with the same patterns=")
        return HeadEntropy(self.layers, self.heads, **{name: value + others[name] for name, value in names.items()})

    def all_reduce(self, device: torch.device | str | None = "cpu") -> None:
        """Add up over the processes of torch.distributed, in place. Under NCCL `device` is the process's own GPU."""
        for tensor in self._tensors().values():
            tensor.copy_(over_processes(tensor, device))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _mean(self, name: str) -> Tensor:
        total = getattr(self, name)
        if total is None:
            raise ValueError(f"{name} was not measured; use EntropyProbe(model, patterns=True)")
        return torch.where(self.rows > 0, total / self.rows.clamp(min=1), torch.nan)


def over_processes(tensor: Tensor, device: torch.device | str | None, operation: str = "SUM") -> Tensor:
    """The sum (or "MAX") of a tensor over the processes of torch.distributed, on the CPU.

    `device` is where they add, under NCCL the process's own GPU; None: every process has the whole sum already.
    """
    if device is None or not torch.distributed.is_initialized():
        return tensor.cpu()
    moved = tensor.to(device, copy=True)
    torch.distributed.all_reduce(moved, getattr(torch.distributed.ReduceOp, operation))
    return moved.cpu()


class HeadSums:
    """Sums by layer. They stay on the device, so adding never synchronises with it; threads may add at once."""

    def __init__(self) -> None:
        self._sums: dict[HeadLayer, dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    def add(self, layer: HeadLayer, entropies: AttentionEntropy) -> None:
        """Add the rows of an attention call."""
        new = sums_of(entropies)
        with self._lock:
            if layer in self._sums:  # not in place: one of the calls may be in inference mode
                new = {name: value + new[name].to(value.device) for name, value in self._sums[layer].items()}
            self._sums[layer] = new

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
            joined[name] = pad_sequence(parts, batch_first=True) if parts[0].dim() else torch.stack(parts)
        return HeadEntropy(labels(layers), heads, **joined)


def sums_of(entropies: AttentionEntropy) -> dict[str, Tensor]:
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
