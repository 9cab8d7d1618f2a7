"""Bytes that one training step of a run keeps for its backward pass, from a pass on this machine's CPU."""

# B sequences of a pass, T tokens

from typing import Any

import torch
from torch import Tensor

from normfree.cost.totals import config_of_run
from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.store.runs import Run


def kept_bytes(run: Run) -> int:
    """Bytes that autograd saves in the model's forward pass, without weights: each storage counted once.

    The head and the loss are left out: they are the same in all decoders of a width and vocabulary.
    """
    config = NormFreeConfig(**{name: value for name, value in config_of_run(run).items() if name != "model_type"})
    model = NormFreeForCausalLM._from_config(config, attn_implementation="sdpa").train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes(), storage  # held: a freed address would be given out again
        return tensor

    ids_BT = torch.zeros(run.spec["train"]["micro_batch_sequences"], run.spec["data"]["context"], dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=run.spec["train"]["precision"] != "fp32")
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(ids_BT)
    return sum(size for size, _ in saved.values())
