"""The base class of measures, and how their sums become values."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from normfree.entropy.statistics import over_processes
from normfree.measures.places import Label

LARGEST_ON_DEVICE = 2**20  # elements of sums that may stay on a GPU; second moments of wide layers would fill it


class Measure:
    """A context manager that reads the forward passes of a model and gives quantities.

    A subclass attaches itself to the model in `attach` and adds up what it reads, or raises ValueError for the model.
    """

    gives: ClassVar[tuple[str, ...]]  # names in `QUANTITIES`
    needs_logits: ClassVar[bool] = False  # the logits of every token
    needs_tokenizer: ClassVar[bool] = False  # as an option `tokenizer`
    needs_training: ClassVar[bool] = False  # only `normfree train` can measure it
    inputs: Mapping[str, Tensor] = MappingProxyType({})
    """Of the current pass, set by the held-out loop; `labels`, where these are not the tokens, and masks among them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __enter__(self) -> Self:
        with ExitStack() as contexts:
            for context in self.attach():
                contexts.enter_context(context)
            self._attached = contexts.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._attached.__exit__(*error)

    def attach(self) -> Iterable[AbstractContextManager[Any]]:
        """Context managers, such as hooks, inside which this measure reads the model; they leave it as it was."""
        return ()

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise ValueError if these first inputs cannot be measured, before anything runs."""

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        """The quantities that this model has, over all passes and processes; `device`: see `over_processes`."""
        return {}

    def mask_of(self, label: Label) -> Tensor | None:
        """Padding mask (0 is padding) of the tokens in a block: the decoder's own; None for patches and frames."""
        stack, config = label.split()[0] if isinstance(label, str) else "", getattr(self.model, "config", None)
        is_whisper = getattr(config, "model_type", None) == "whisper"  # its encoder attends to all frames
        if stack in ("vision", "audio", "qformer") or (is_whisper and stack == "encoder"):
            return None
        has_encoder: bool = getattr(config, "is_encoder_decoder", False)
        mask = self.inputs.get("decoder_attention_mask" if stack == "decoder" and has_encoder else "attention_mask")
        return mask if mask is not None and mask.dim() == 2 else None

    @property
    def layers(self) -> Sequence[Label] | None:
        """The measured layers, unless these are 0, 1, 2, ..."""
        return None


class LayerMeasure(Measure):
    """Base of measures that keep sums and maxima of each layer, of which `values` makes the layer's quantities."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.sums: defaultdict[Any, dict[str, Tensor]] = defaultdict(dict)
        self.maxima: defaultdict[Any, dict[str, Tensor]] = defaultdict(dict)

    def add(self, layer: Hashable, **parts: Tensor | int) -> None:
        """Add to the sums of a layer, on its device, which need not be waited for; large ones, on the CPU."""
        sums = self.sums[layer]
        for name, part in parts.items():
            part = torch.as_tensor(part)
            part = part.cpu() if part.numel() > LARGEST_ON_DEVICE else part
            sums[name] = sums[name] + part if name in sums else part

    def raise_to(self, layer: Hashable, **values: Tensor) -> None:
        """Raise the maxima of a layer to these values, in float64 on its device; a NaN stays."""
        maxima = self.maxima[layer]
        for name, value in values.items():
            value = value.double()
            maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value

    def values(self, *_: Any, **kept: Any) -> dict[str, Tensor]:
        """The quantities of a layer, () or (H,) each, from its sums and maxima, which a subclass names as arguments."""
        raise NotImplementedError

    def keys(self) -> Iterable[Hashable]:
        """What `add` and `raise_to` call the layers, in their order."""
        return range(len(self.layers or ()))

    def layer_values(self, layer: Any, device: torch.device | str | None) -> dict[str, Tensor]:
        """The quantities of a layer over all processes; none if no pass reached it."""
        kept = {name: over_processes(part, device) for name, part in self.sums.get(layer, {}).items()}
        maxima = self.maxima.get(layer, {})
        kept |= {name: maximum_over_processes(value, device) for name, value in maxima.items()}
        return self.values(**kept) if kept else {}

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        if not self.sums and not self.maxima:
            raise ValueError(f"no forward pass reached {type(self).__name__}; run one inside the `with` block")
        values = stacked([self.layer_values(layer, device) for layer in self.keys()])
        return {name: values[name] for name in self.gives if name in values}


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """(L,) or (L, H) float64 values from those of each layer, NaN where a layer, or its last heads, have none."""
    nothing = torch.tensor([torch.nan], dtype=torch.float64)
    values = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        of_layers = [row[name].double() if name in row else nothing for row in rows]
        padded_LH = pad_sequence([torch.atleast_1d(value) for value in of_layers], True, torch.nan)
        values[name] = padded_LH if any(name in row and row[name].dim() for row in rows) else padded_LH[:, 0]
    return values


def values_of(measures: Sequence[Measure], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The value of every quantity of the measures, over all passes and processes; see `Measure.pooled`."""
    return {name: value for measure in measures for name, value in measure.pooled(device).items()}


def mean_over_processes(total: Tensor, count: Tensor, device: torch.device | str | None) -> Tensor:
    """The mean of what all processes counted; NaN where that is nothing."""
    total, count = over_processes(total, device), over_processes(count, device)
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def maximum_over_processes(value: Tensor, device: torch.device | str | None) -> Tensor:
    is_nan = over_processes(value.isnan().long(), device) > 0  # backends treat NaN differently
    highest = over_processes(torch.where(value.isnan(), -torch.inf, value), device, "MAX")
    return torch.where(is_nan, torch.nan, highest)


def exponential(value: float) -> float:
    """exp of a number; infinite where that overflows a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
