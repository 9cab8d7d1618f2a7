"""measure(model, inputs, "heads"): quantities of a model on a text, as arrays, a table or a heatmap."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback, TrainerState

from normfree.measures import MEASURES, open_measures, periods_of
from normfree.measures.held_out import Batch, measure_batches
from normfree.measures.measure import values_of
from normfree.measures.places import Label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A text, token ids (T,) or (N, T), the keyword arguments of one forward pass, or those of several.
Inputs = str | Tensor | Batch | Sequence[Batch]


@dataclass(frozen=True)
class Measurement:
    """Measured values, as arrays by the name of the quantity."""

    values: dict[str, np.ndarray]
    """[L, H], [L] or [], by the axes in `normfree.store.quantities`."""
    layers: dict[str, list[Label]]
    """The layers of each quantity: their numbers in the model, or `encoder 0` where it has several stacks."""
    seconds: float
    peak_memory_mib: float

    def __getitem__(self, quantity: str) -> np.ndarray:
        if quantity not in self.values:
            raise KeyError(f"{quantity!r} was not measured; measured: {', '.join(self.values)}")
        return self.values[quantity]

    def to_frame(self) -> pd.DataFrame:
        """A column a quantity and one row a head, or a layer, or only one, if none has more; the others repeat."""
        deepest = max((value.ndim for value in self.values.values()), default=0)
        columns = {}
        for name, value in self.values.items():
            if value.ndim == deepest > 0:
                places = [self.layers[name], *map(range, value.shape[1:])]
                index = pd.MultiIndex.from_product(places, names=["layer", "head"][:deepest])
                columns[name] = pd.Series(value.ravel().astype(float), index=index)
        frame = pd.DataFrame(columns).reset_index() if deepest else pd.DataFrame(index=[0])
        for name, value in self.values.items():
            if value.ndim == 0:
                frame[name] = float(value)
            elif value.ndim < deepest:
                frame[name] = pd.Series(value, index=self.layers[name]).reindex(frame["layer"]).to_numpy()
        return frame

    def plot(self, quantity: str = "entropy_nats", *, ax: Axes | None = None, title: str = "") -> Axes:
        """A heatmap of a quantity that every head has; see `normfree.plot_heads`."""
        from normfree.report.views import plot_heads

        return plot_heads(self, quantity, ax=ax, title=title)

    def __repr__(self) -> str:
        return self.to_frame().to_string(max_rows=40)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, max_rows=40, float_format="%.4g")


def measure(
    model: PreTrainedModel,
    inputs: Inputs,
    measures: str | Sequence[str] = "heads",
    *,
    batch: int = 1,
    tokenizer: Any = None,
    progress: bool = False,
    skip_refused: bool = False,
    **options: Mapping[str, Any],
) -> Measurement:
    """Measure a model on a text, token ids or model inputs, in evaluation mode.

    `batch` is the number of sequences of token ids in a forward pass. A text is one sequence, tokenized by `tokenizer`
    (default: the one saved beside the model), which `selectivity` needs too. `options` are keyword arguments of single
    measures, e.g. `heads={"method": "eager"}`. With `skip_refused`, measures that cannot serve the model are left out
    with a warning, unless none can.

    Raises ValueError for an unknown measure, one that cannot serve the model, or a text if the model reads none.
    """
    names = list(periods_of([measures] if isinstance(measures, str) else measures, 1))
    if unknown := sorted(options.keys() - set(names)):
        raise ValueError(f"{unknown[0]}= is no chosen measure; give options as heads={{'method': 'eager'}}")
    if of_training := [name for name in names if MEASURES[name].needs_training]:
        raise ValueError(f"measure {of_training[0]}: only a training run has it; give it in probe.measures")
    began = time.perf_counter()
    batches = _batches(model, inputs, batch, tokenizer)
    tokenizing = partial(_tokenizer, model, tokenizer)
    opened = open_measures(names, model, tokenizing, skip_refused=skip_refused, **options)
    measure_batches(model, batches, opened, progress="measuring" if progress else None)
    values = {name: value.numpy() for name, value in values_of(opened).items()}
    numbers = {name: each.layers for each in opened for name in each.gives}
    return Measurement(
        values=values,
        layers={name: list(numbers[name] or range(len(value))) for name, value in values.items() if value.ndim},
        seconds=time.perf_counter() - began,
        peak_memory_mib=peak_memory_mib(next(model.parameters()).device),
    )


class MeasureCallback(TrainerCallback):
    """Measure a model while any transformers Trainer trains it.

    ```
    callback = MeasureCallback("heads", inputs=held_out_ids, every=100)
    Trainer(..., callbacks=[callback]).train()
    callback.to_frame()     # one row a head and step
    ```
    Measures before the first step, every `every` steps and after the last one, and disturbs no training.
    """

    def __init__(self, measures: str | Sequence[str], *, inputs: Inputs, every: int = 100, batch: int = 8) -> None:
        self.measures, self.inputs, self.every, self.batch = measures, inputs, every, batch
        self.history: dict[int, Measurement] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
        self._measure(state.global_step, more["model"])

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
        if state.global_step % self.every == 0:
            self._measure(state.global_step, more["model"])

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
        if state.global_step not in self.history:  # stopped early
            self._measure(state.global_step, more["model"])

    def _measure(self, step: int, model: PreTrainedModel) -> None:
        self.history[step] = measure(model, self.inputs, self.measures, batch=self.batch)

    def to_frame(self) -> pd.DataFrame:
        """The tables of all steps, with a column `step`."""
        frames = [measured.to_frame().assign(step=step) for step, measured in self.history.items()]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _batches(model: PreTrainedModel, inputs: Inputs, batch: int, tokenizer: Any) -> Iterable[Batch]:
    if isinstance(inputs, str | Tensor) and model.main_input_name != "input_ids":
        reads = model.main_input_name
        raise ValueError(f"{type(model).__name__} reads {reads}, no text: give {{'{reads}': ...}}")
    if isinstance(inputs, str):
        inputs = cast(Tensor, _tokenizer(model, tokenizer)(inputs, return_tensors="pt")["input_ids"])
    if isinstance(inputs, np.ndarray):
        inputs = torch.from_numpy(inputs)
    if isinstance(inputs, Tensor):
        if not inputs.numel():
            raise ValueError("there is nothing to measure: the text has no tokens")
        return [{"input_ids": ids_BT} for ids_BT in torch.atleast_2d(inputs).split(batch)]
    if isinstance(inputs, Mapping):
        return [inputs]
    if isinstance(inputs, Sequence) and not all(isinstance(each, Mapping) for each in inputs):
        raise ValueError("inputs: give a text, token ids (N, T) as a tensor or array, or dicts of model arguments")
    return cast(Sequence[Batch], inputs)


def _tokenizer(model: PreTrainedModel, tokenizer: Any) -> Any:
    if tokenizer is None and not model.name_or_path:
        raise ValueError("give tokenizer=, because this model was not loaded by a name; for a text, token ids will do")
    return tokenizer or AutoTokenizer.from_pretrained(model.name_or_path)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB, on the GPU if `device` is one, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # ru_maxrss counts the parent's memory at the fork
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
