"""The held-out loop: text through a model in evaluation mode, with measures attached."""

# B batch, T tokens, N blocks

import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from normfree.entropy.statistics import over_processes
from normfree.measures.measure import Measure

LARGEST_LOGITS = 2**26  # elements of a batch's logits: 256 MiB in float32
LARGEST_LOGITS_ON_GPU = 2**28
Batch = Mapping[str, Tensor]  # keyword arguments of the model, but for `labels`, which go to the measures


@torch.no_grad()
def measure_batches(
    model: PreTrainedModel, batches: Iterable[Batch], measures: Sequence[Measure], *, progress: str | None = None
) -> None:
    """Pass batches through the model in evaluation mode, without gradients, while the measures read.

    Logits are computed only if a measure needs them. `progress` is the title of a bar, shown on a terminal. Processes
    that hold parts of one model wait for each other in every pass, so those with fewer batches add unmeasured passes.
    Raises ValueError if there is no batch, or a measure refuses the model.
    """
    if measures and all(measure.needs_training for measure in measures):  # they read no forward pass
        return
    device = next(model.parameters()).device
    total = len(batches) if isinstance(batches, Sized) else None
    reads, words = model, dict[str, int]()
    if not any(measure.needs_logits for measure in measures):
        if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
            words = {"logits_to_keep": 1}
        elif model.main_input_name == "input_ids":  # an image has few logits
            reads = model.base_model
    known = inspect.signature(reads.forward).parameters.values()
    if any(word.name == "use_cache" or word.kind is word.VAR_KEYWORD for word in known):  # not in encoders of images
        words["use_cache"] = False
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("there is nothing to measure: give at least one sequence")
    for measure in measures:
        measure.check(first)
    passes_to_add = 0
    if isinstance(model, FSDPModule):
        assert total is not None, "a sharded model is measured on a list of batches"
        passes_to_add = int(over_processes(torch.tensor(total), device, "MAX")) - total
    arguments: dict[str, Tensor] = {}
    with in_evaluation_mode(model), ExitStack() as contexts:
        for measure in measures:
            contexts.enter_context(measure)
        bar = {"total": total, "desc": progress, "disable": None if progress else True, "leave": False}
        for batch in tqdm(itertools.chain([first], batches), **bar):
            inputs = {name: value.to(device) for name, value in batch.items()}
            for measure in measures:
                measure.inputs = inputs
            arguments = {name: value for name, value in inputs.items() if name != "labels"}
            reads(**arguments, **words)
        contexts.close()
        for _ in range(passes_to_add):
            reads(**arguments, **words)
    if isinstance(model, FSDPModule):
        model.reshard()  # a forward pass leaves the weights outside the blocks whole


def blocks_of(
    model: PreTrainedModel, blocks_NT: Tensor, batch_sequences: int, measures: Sequence[Measure] = ()
) -> list[Batch]:
    """Batches of the blocks of this process, which share all blocks evenly; our models make inputs of their rows.

    If a measure needs logits of tokens, batches are smaller where these would not fit.
    """
    if torch.distributed.is_initialized():
        blocks_NT = blocks_NT[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
    reads_tokens = model.main_input_name == "input_ids"
    if reads_tokens and any(measure.needs_logits for measure in measures):
        device = next(model.parameters()).device
        fitting = _largest_logits_on(device) if device.type == "cuda" else LARGEST_LOGITS
        fitting //= blocks_NT.shape[1] * model.config.get_text_config().vocab_size
        batch_sequences = max(1, min(batch_sequences, fitting))
    batch_of = getattr(model, "batch_of", lambda ids_BT: {"input_ids": ids_BT})
    return [batch_of(ids_BT) for ids_BT in blocks_NT.split(batch_sequences)]


@functools.cache
def _largest_logits_on(gpu: torch.device) -> int:
    """A sixteenth of the memory that was free when first asked: all evaluations of a process have the same batches."""
    elements = torch.cuda.mem_get_info(gpu)[0] // (16 * 6)  # 6 bytes each in bf16
    return min(max(LARGEST_LOGITS, elements), LARGEST_LOGITS_ON_GPU)


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
