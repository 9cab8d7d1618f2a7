"""`measure(model, inputs, "heads")`: the quantities of one model on one text, as a table, a heatmap, or arrays."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from normfree.measures import open_measures, periods_of
from normfree.measures.held_out import Batch, measure_batches
from normfree.measures.measure import values_of
from normfree.store.quantities import QUANTITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Inputs = str | Tensor | Batch | Sequence[Batch]
"""A text, token ids (T,) or (N, T), the keyword arguments of one forward pass, or those of several."""


@dataclass(frozen=True)
class Measurement:
    """What was measured, as arrays by the name of the quantity."""

    values: dict[str, np.ndarray]
    """[L, H], [L] or []: the axes are those of `normfree.store.quantities`."""
    layers: dict[str, list[int]]
    """The model's own numbers of the layers of each quantity."""
    seconds: float
    peak_memory_mib: float

    def __getitem__(self, quantity: str) -> np.ndarray:
        return self.values[quantity]

    def to_frame(self) -> pd.DataFrame:
        """One row a head, a column a quantity; what is measured for each layer stands in each of its heads' rows.

        One row a layer where no quantity is measured for each head, one row in all where none is for each layer.
        """
        deepest = max((value.ndim for value in self.values.values()), default=0)
        rows: dict[tuple[int, ...], dict[str, float]] = {(): {}} if deepest == 0 else {}
        for name, value in self.values.items():
            if value.ndim == deepest:
                for index in np.ndindex(value.shape):
                    place = (self.layers[name][index[0]], *index[1:]) if index else ()
                    rows.setdefault(place, {})[name] = float(value[index])
        for name, value in self.values.items():
            if value.ndim == 0 < deepest:
                for row in rows.values():
                    row[name] = float(value)
            if value.ndim == 1 < deepest:
                of_layer = dict(zip(self.layers[name], value.tolist(), strict=True))
                for place, row in rows.items():
                    row[name] = of_layer.get(place[0], np.nan)
        axes = ("layer", "head")[:deepest]
        return pd.DataFrame([{**dict(zip(axes, place, strict=True)), **row} for place, row in rows.items()])

    def plot(self, quantity: str = "entropy_nats", *, ax: Axes | None = None, title: str = "") -> Axes:
        """A heatmap of a quantity that every head has. Raises ValueError for one that was not measured."""
        from normfree.report.plots import heatmap

        if quantity not in self.values or self.values[quantity].ndim != 2:
            heads = [name for name, value in self.values.items() if value.ndim == 2]
            raise ValueError(f"no number a head is called {quantity!r} here; there are: {', '.join(heads) or 'none'}")
        ceiling = QUANTITIES[quantity].ceiling
        top = self.values.get(ceiling) if isinstance(ceiling, str) else ceiling
        values_LH, numbers = self.values[quantity], self.layers[quantity]
        return heatmap(values_LH, quantity=quantity, ceiling=top, layers=numbers, ax=ax, title=title)

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
    **options: Mapping[str, Any],
) -> Measurement:
    """Measure a model on a text, token ids or model inputs, in evaluation mode.

    `batch` is how many sequences of token ids go through the model at once. A text is cut nowhere: it is one sequence,
    made by `tokenizer` (default: the one saved beside the model). `options` are keyword arguments of single measures,
    e.g. `heads={"method": "eager"}`.

    Raises ValueError for an unknown measure, one that the model cannot serve, or a batch below 1.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    names = [measures] if isinstance(measures, str) else list(measures)
    names = list(periods_of(names, 1))
    if unknown := sorted(options.keys() - set(names)):
        raise ValueError(f"{unknown[0]}= is no chosen measure; options are given as heads={{'method': 'eager'}}")
    began = time.perf_counter()
    opened = open_measures(names, model, **options)
    batches = _batches(model, inputs, batch, tokenizer)
    measure_batches(model, batches, opened, progress="measuring" if progress else None)
    device = next(model.parameters()).device
    values = {name: value.numpy() for name, value in values_of(opened).items()}
    numbers = {name: each.layers for each in opened for name in each.gives}
    return Measurement(
        values=values,
        layers={name: numbers[name] or list(range(len(value))) for name, value in values.items() if value.ndim},
        seconds=time.perf_counter() - began,
        peak_memory_mib=peak_memory_mib(device),
    )


class MeasureCallback(TrainerCallback):
    """Measure a model while any transformers Trainer trains it.

    ```
    callback = MeasureCallback("heads", inputs=held_out_ids, every=100)
    Trainer(..., callbacks=[callback]).train()
    callback.to_frame()     # one row a head and step
    ```
    Measures before the first step, every `every` steps and after the last one. Training is not disturbed: no random
    number is drawn, and modes and hooks are as before.
    """

    def __init__(self, measures: str | Sequence[str], *, inputs: Inputs, every: int = 100, batch: int = 8) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self.measures, self.inputs, self.every, self.batch = measures, inputs, every, batch
        self.history: dict[int, Measurement] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._measure(state.global_step, more["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, more["model"])

    def _measure(self, step: int, model: PreTrainedModel) -> None:
        self.history[step] = measure(model, self.inputs, self.measures, batch=self.batch)

    def to_frame(self) -> pd.DataFrame:
        """`Measurement.to_frame` of every step, below each other, with a column `step`."""
        frames = [measured.to_frame().assign(step=step) for step, measured in self.history.items()]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _batches(model: PreTrainedModel, inputs: Inputs, batch: int, tokenizer: Any) -> Iterable[Batch]:
    if isinstance(inputs, str):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model.name_or_path)
        inputs = tokenizer(inputs, return_tensors="pt")["input_ids"]
    if isinstance(inputs, Tensor):
        return [{"input_ids": ids_BT} for ids_BT in torch.atleast_2d(inputs).split(batch)]
    return [inputs] if isinstance(inputs, Mapping) else cast(Sequence[Batch], inputs)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory this process has held so far, in MiB: on a GPU of its own, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts in ru_maxrss what the parent held when it started this process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1]) / 2**10  # pyright: ignore
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
