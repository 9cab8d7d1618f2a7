"""The held-out loop: text through a model in evaluation mode, with measures attached."""

# B batch, T tokens, N blocks

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from normfree.measures.measure import Measure

LARGEST_LOGITS = 2**26
"""Elements of a batch's logits: 256 MiB in float32."""
Batch = Mapping[str, Tensor]
"""Keyword arguments of the model; `labels`, where given, go to the measures and not to the model."""


@torch.no_grad()
def measure_batches(
    model: PreTrainedModel, batches: Iterable[Batch], measures: Sequence[Measure], *, progress: str | None = None
) -> None:
    """Pass batches through the model in evaluation mode, without gradients, while the measures read.

    Logits are computed only where a measure needs them. `progress` is the title of a bar, shown on a terminal.
    Raises ValueError where there is no batch, or a measure refuses the model.
    """
    device = next(model.parameters()).device
    total = len(batches) if isinstance(batches, Sized) else None
    call = partial(model, use_cache=False) if any(m.needs_logits for m in measures) else without_logits(model)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("there is nothing to measure: give at least one sequence")
    for measure in measures:
        measure.check(first)
    with ExitStack() as inside:
        inside.enter_context(in_evaluation_mode(model))
        for measure in measures:
            inside.enter_context(measure)
        shown = {"total": total, "desc": progress, "disable": None if progress else True, "leave": False}
        for batch in tqdm(itertools.chain([first], batches), **shown):
            inputs = {name: value.to(device) for name, value in batch.items()}
            labels_BT, mask_BT = inputs.pop("labels", None), inputs.get("attention_mask")
            for measure in measures:
                measure.expect(labels_BT, mask_BT if mask_BT is not None and mask_BT.dim() == 2 else None)
            call(**inputs)


def blocks_of(
    model: PreTrainedModel, blocks_NT: Tensor, batch_sequences: int, measures: Sequence[Measure] = ()
) -> list[Batch]:
    """Batches of this process's share of the blocks: all of them where there is one process.

    Where a measure needs logits, batches are smaller than `batch_sequences` if their logits would not fit
    `LARGEST_LOGITS`.
    """
    if torch.distributed.is_initialized():
        blocks_NT = blocks_NT[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
    if any(measure.needs_logits for measure in measures):
        fitting = LARGEST_LOGITS // (blocks_NT.shape[1] * model.config.get_text_config().vocab_size)
        batch_sequences = max(1, min(batch_sequences, fitting))
    return [{"input_ids": ids_BT} for ids_BT in blocks_NT.split(batch_sequences)]


def without_logits(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward pass with at most the logits of one token."""
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        return partial(model, use_cache=False, logits_to_keep=1)
    return partial(model.base_model, use_cache=False)


class in_evaluation_mode:  # noqa: N801 - reads as a verb where it is used
    """Context manager: evaluation mode inside, the modules' own modes as found outside."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = {module: module.training for module in self.model.modules()}
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self.modes.items():
            module.training = training
