"""Bytes that a training step keeps for its backward pass, from a pass on this machine's CPU."""

# B sequences of a pass, T tokens

from typing import Any

import torch
from torch import Tensor

from normfree.cost.totals import config_of_run
from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.store.runs import Run


def kept_bytes(run: Run) -> int:
    """Bytes that a pass of a run keeps in its decoder, without weights, the head and the loss."""
    config = NormFreeConfig(**{name: value for name, value in config_of_run(run).items() if name != "model_type"})
    sequences, tokens = run.spec["train"]["micro_batch_sequences"], run.spec["data"]["context"]
    return saved_bytes(config, sequences, tokens, autocast=run.spec["train"]["precision"] != "fp32")


def saved_bytes(config: NormFreeConfig, sequences: int, tokens: int, *, autocast: bool) -> int:
    """Bytes that autograd saves in a forward pass in fp32, or under autocast to bf16, which saves cast weights too."""
    model = NormFreeForCausalLM._from_config(config, attn_implementation="sdpa").train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes(), storage  # held: a freed address would be given out again
        return tensor

    ids_BT = torch.zeros(sequences, tokens, dtype=torch.long)
    casts = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with casts, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(ids_BT)
    return sum(size for size, _ in saved.values())
