"""What a measure is, and how its sums become values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import ClassVar, Self

import torch
from torch import Tensor

from normfree.entropy.statistics import over_processes
from normfree.store.quantities import QUANTITIES

Total = Tensor | tuple[Tensor, Tensor]
"""A running sum or maximum, or the sum and the count of a mean."""


class Measure:
    """A context manager that reads the forward passes of a model and gives quantities.

    A subclass names what it gives, attaches itself to the model in `__enter__`, adds up what passes by, and leaves the
    model as it was in `__exit__`. Raises ValueError when it is built for a model that it cannot serve.
    """

    gives: ClassVar[tuple[str, ...]]
    """Names in `QUANTITIES`."""
    needs_logits: ClassVar[bool] = False
    """Whether the model must compute the logits of every token."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Look at the first inputs before anything runs. Raises ValueError for what cannot be measured."""

    def expect(self, labels_BT: Tensor | None, mask_BT: Tensor | None) -> None:
        """Hear the labels of the next pass (None: the tokens are their own labels) and which tokens are no padding."""

    def totals(self) -> dict[str, Total]:
        """Sums over all passes so far, by quantity. A quantity that this model does not have is left out."""
        raise NotImplementedError

    @property
    def layers(self) -> list[int] | None:
        """Numbers of the measured layers, where these are not 0, 1, 2, ..."""
        return None


def values_of(measures: Sequence[Measure], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The value of every quantity that the measures give, added up over processes and divided once.

    `device` is where the processes' backend adds: the process's own GPU under NCCL; None where each process measured
    everything. A mean of nothing is NaN.
    """
    return {
        name: _MERGES[QUANTITIES[name].merges](total, device)
        for measure in measures
        for name, total in measure.totals().items()
    }


def _mean(total: Total, device: torch.device | str | None) -> Tensor:
    assert isinstance(total, tuple)
    summed, count = (over_processes(part, device) for part in total)
    return torch.where(count > 0, summed / count.clamp(min=1), torch.nan)


def _exponential(total: Total, device: torch.device | str | None) -> Tensor:
    return torch.tensor(exponential(_mean(total, device).item()), dtype=torch.float64)


def exponential(value: float) -> float:
    """exp of a number; infinite where that overflows a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _sum(total: Total, device: torch.device | str | None) -> Tensor:
    assert isinstance(total, Tensor)
    return over_processes(total, device)


def _maximum(total: Total, device: torch.device | str | None) -> Tensor:
    assert isinstance(total, Tensor)
    broken = over_processes(total.isnan().long(), device) > 0  # backends differ in what they make of NaN
    highest = over_processes(torch.where(total.isnan(), -torch.inf, total), device, "MAX")
    return torch.where(broken, torch.nan, highest)


_MERGES: Mapping[str, Callable[[Total, torch.device | str | None], Tensor]] = {
    "mean": _mean,
    "root of the mean": lambda total, device: _mean(total, device).sqrt(),
    "exponential of the mean": _exponential,
    "sum": _sum,
    "maximum": _maximum,
}
