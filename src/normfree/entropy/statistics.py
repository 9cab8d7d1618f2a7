"""HeadEntropy: sums and counts per layer and head; divided only when asked, merged by +."""

# L measured layers, H heads of the widest layer

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadEntropy:
    """Entropy of attention heads over any number of batches.

    Rows are (sequence, query) pairs. A row is counted when it sees a key and its entropy is finite; row 0,
    whose entropy is always 0, is counted, as in the paper. Non-finite rows are counted apart, never as 0.
    Where layers differ in heads, H is the largest number and the missing heads have no rows (mean NaN).
    """

    layers: list[int]
    """Indices of the measured layers; hybrid models skip some."""
    heads: list[int]
    """Heads of each of these layers."""
    sum_nats: Tensor
    """(L, H) float64."""
    rows: Tensor
    """(L, H) int64: counted rows."""
    nonfinite_rows: Tensor
    """(L, H) int64: rows that came out NaN or infinite."""
    sum_ceiling_nats: Tensor
    """(L,) float64: sum of ln(visible keys) over the counted rows of all heads."""
    ceiling_rows: Tensor
    """(L,) int64: these rows, of all heads."""
    sum_distance: Tensor | None = None
    """(L, H) float64 tokens, with EntropyProbe(patterns=True)."""
    sum_first_mass: Tensor | None = None
    """(L, H) float64, with EntropyProbe(patterns=True)."""

    def mean_nats(self) -> Tensor:
        """(L, H) float64: mean entropy of each head in nats; NaN for a head with no finite row."""
        return self._mean(self.sum_nats)

    def ceiling_nats(self) -> Tensor:
        """(L,) float64: mean of ln(visible keys), the entropy of uniform attention on the same rows, all heads of the
        layer together: where single heads have non-finite rows, it lies between theirs and the others'. NaN for a layer
        without a finite row."""
        return self.sum_ceiling_nats / self.ceiling_rows

    def mean_distance(self) -> Tensor:
        """(L, H) float64: mean distance in tokens from a query to where it attends."""
        return self._mean(self._pattern("sum_distance"))

    def mean_first_mass(self) -> Tensor:
        """(L, H) float64: mean probability on the first real token (attention sink)."""
        return self._mean(self._pattern("sum_first_mass"))

    def __add__(self, other: HeadEntropy) -> HeadEntropy:
        """Merge two measurements of the same heads over different rows."""
        if not isinstance(other, HeadEntropy):
            return NotImplemented
        if (self.layers, self.heads) != (other.layers, other.heads):
            mine, theirs = (f"layers {one.layers} with heads {one.heads}" for one in (self, other))
            raise ValueError(f"cannot merge {mine} and {theirs}: both must come from one architecture")
        names, others = self._tensors(), other._tensors()
        if names.keys() != others.keys():
            raise ValueError("cannot merge a measurement with patterns=True and one without")
        return HeadEntropy(self.layers, self.heads, **{name: value + others[name] for name, value in names.items()})

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Add up over the processes of torch.distributed, in place. `device` is where their backend adds: under NCCL
        the process's own GPU. Without processes nothing happens."""
        for tensor in self._tensors().values():
            tensor.copy_(over_processes(tensor, device))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _mean(self, total: Tensor) -> Tensor:
        return torch.where(self.rows > 0, total / self.rows.clamp(min=1), torch.nan)

    def _pattern(self, name: str) -> Tensor:
        value = getattr(self, name)
        if value is None:
            raise ValueError("not measured; ask for it with EntropyProbe(model, patterns=True)")
        return value


def over_processes(tensor: Tensor, device: torch.device | str | None, operation: str = "SUM") -> Tensor:
    """The tensor added up (or its "MAX") over the processes of torch.distributed, on the CPU.

    NCCL moves tensors of its own device only, so it travels on `device`. Without processes, or with None for a sum that
    every process has whole, nothing is added.
    """
    if device is None or not torch.distributed.is_initialized():
        return tensor.cpu()
    moved = tensor.to(device, copy=True)
    torch.distributed.all_reduce(moved, getattr(torch.distributed.ReduceOp, operation))
    return moved.cpu()
