"""The base class of measures, and how their sums become values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from normfree.entropy.statistics import over_processes
from normfree.measures.places import Label
from normfree.store.quantities import QUANTITIES

Total = Tensor | tuple[Tensor, Tensor]
"""A running sum or maximum, or the sum and the count of a mean."""


class Measure:
    """A context manager that reads the forward passes of a model and gives quantities.

    A subclass names what it gives, attaches itself to the model in `attach` and adds up what it reads. Raises
    ValueError if the measure cannot serve the model.
    """

    gives: ClassVar[tuple[str, ...]]
    """Names in `QUANTITIES`."""
    needs_logits: ClassVar[bool] = False
    """True if the model must compute the logits of every token."""
    needs_tokenizer: ClassVar[bool] = False
    """True if the measure takes an option `tokenizer`."""
    needs_training: ClassVar[bool] = False
    """True if only `normfree train` can measure it."""
    labels_BT: Tensor | None = None
    """Labels of the current pass, set by the held-out loop; None: the tokens are the labels."""
    mask_BT: Tensor | None = None
    """Padding mask of the current pass (0 is padding), set by the held-out loop."""
    decoder_mask_BT: Tensor | None = None
    """The same of a decoder's tokens, where an encoder has tokens of its own."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __enter__(self) -> Self:
        self._attached = self.attach()
        self._attached.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._attached.__exit__(*error)

    def attach(self) -> AbstractContextManager[Any]:
        """A context manager inside which this measure reads the model, and that leaves the model as it was."""
        return nullcontext()

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise ValueError if these first inputs cannot be measured, before anything runs."""

    def totals(self) -> dict[str, Total]:
        """Sums over all passes so far, by quantity, but for pooled ones. What this model does not have is left out."""
        raise NotImplementedError

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        """Values that no merging of values gives, computed from sums over all processes (`over_processes`)."""
        return {}

    def mask_of(self, label: Label) -> Tensor | None:
        """Padding mask of the tokens in a block: the decoder's own, none for patches and frames, else `mask_BT`."""
        stack = label.split()[0] if isinstance(label, str) else ""
        if stack in ("vision", "audio"):
            return None
        has_encoder: bool = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        return self.decoder_mask_BT if stack == "decoder" and has_encoder else self.mask_BT

    @property
    def layers(self) -> Sequence[Label] | None:
        """The measured layers, unless these are 0, 1, 2, ..."""
        return None


def values_of(measures: Sequence[Measure], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The value of every quantity of the measures, added up over processes and divided once; a mean of nothing is NaN.

    `device` is where the backend of the processes adds: under NCCL the process's own GPU. None means that each process
    measured everything.
    """
    values = {}
    for measure in measures:
        totals = measure.totals().items()
        values |= {name: merged(QUANTITIES[name].merges, total, device) for name, total in totals}
        values |= measure.pooled(device)
    return values


def merged(how: str, total: Total, device: torch.device | str | None) -> Tensor:
    """One quantity over all processes; `how` is one of `Merge`."""
    if isinstance(total, tuple):
        summed, count = (over_processes(part, device) for part in total)
        mean = torch.where(count > 0, summed / count.clamp(min=1), torch.nan)
        if how == "root of the mean":
            return mean.sqrt()
        if how == "exponential of the mean":
            return torch.tensor(exponential(mean.item()), dtype=torch.float64)
        assert how == "mean"
        return mean
    if how == "sum":
        return over_processes(total, device)
    if how == "minimum":
        assert isinstance(total, Tensor)
        return -merged("maximum", -total, device)
    assert how == "maximum"
    is_nan = over_processes(total.isnan().long(), device) > 0  # backends treat NaN differently
    highest = over_processes(torch.where(total.isnan(), -torch.inf, total), device, "MAX")
    return torch.where(is_nan, torch.nan, highest)


def exponential(value: float) -> float:
    """exp of a number; infinite where that overflows a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
