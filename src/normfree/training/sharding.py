"""FSDP2: each process holds a part of every parameter, gradient and optimiser state.

A checkpoint holds the parts in torch's distributed format, which a resume on any number of processes can read.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from normfree.measures import MEASURES, periods_of
from normfree.model import HEADS
from normfree.model.blocks import Block
from normfree.model.modeling import NormFreePreTrainedModel
from normfree.spec.run import RunSpec
from normfree.store.checkpoints import SHARDS


def check_can_shard(spec: RunSpec) -> None:
    """Raise ValueError for choices that need whole matrices, or that nobody has tested with FSDP."""
    train = spec.train
    others = [name for name in periods_of(spec.probe.measures, 1) if MEASURES[name].needs_training]
    refused = {
        "train.optimizer=muon": train.optimizer == "muon",
        "train.objective=entropy_band": train.objective == "entropy_band",
        "train.precision=fp16": train.precision == "fp16",
        f"train.compile={train.compile}".lower(): bool(train.compile),
        f"probe.measures={','.join(others)}": bool(others),
        f"model.linear={spec.model.get('linear')}": spec.model.get("linear", "plain") != "plain",
    }
    if chosen := " and ".join(key for key, is_chosen in refused.items() if is_chosen):
        raise ValueError(f"train.sharding=fsdp does not work with {chosen}: leave that out, or give train.sharding=ddp")


def shard(model: NormFreePreTrainedModel, precision: str, device: torch.device) -> None:
    """Shard every block, then the rest, over all processes, in place. Weights must be equal in all of them.

    Parts stay in fp32. With bf16 the linear maps of the blocks are gathered in bf16, as autocast would cast them, and
    their gradients added in fp32; norms and all else of a block are a group of their own, gathered in fp32.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    in_bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        own = [module for module in block.modules() if next(module.parameters(recurse=False), None) is not None]
        others = [module for module in own if not isinstance(module, nn.Linear)]
        if precision == "bf16" and others:
            fully_shard(others, mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=in_bf16 if precision == "bf16" else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)


def free_gathered_weights(model: nn.Module) -> None:
    """Free the weights outside the blocks, which FSDP2 keeps whole after a forward pass without a backward pass."""
    if isinstance(model, FSDPModule):
        model.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_shards(folder: Path, model: NormFreePreTrainedModel, optimizer: Optimizer) -> None:
    """Write the parts of all processes under `folder`. Raises OSError in each if one of them fails."""
    try:
        state_dict_saver.save(_weights(model) | _states(model, optimizer), checkpoint_id=folder / SHARDS)
    except CheckpointException as error:  # not an Exception
        raise OSError("; ".join(f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())) from error


def load_shards(folder: Path, model: NormFreePreTrainedModel, optimizer: Optimizer | None = None) -> None:
    """Read this process's part of the weights and buffers, or of the states of `optimizer`, in place."""
    parts = _weights(model) if optimizer is None else _states(model, optimizer)
    state_dict_loader.load(parts, checkpoint_id=folder / SHARDS)


def _weights(model: NormFreePreTrainedModel) -> dict[str, Tensor]:
    """Sharded parameters, and buffers, without the second name of a tied weight."""
    return {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}


def _states(model: NormFreePreTrainedModel, optimizer: Optimizer) -> dict[str, Tensor]:
    """AdamW's step and moments of every parameter; zero, as AdamW would begin, where it has taken no step."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert isinstance(optimizer, AdamW), "check_can_shard refuses the others"
    states = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state |= {"step": step, "exp_avg": torch.zeros_like(parameter)}
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            states |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
    return states


def gather(model: NormFreePreTrainedModel) -> NormFreePreTrainedModel | None:
    """A whole copy on the CPU, free of FSDP's classes, in process 0, and None elsewhere; all processes must call it."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank():
        return None
    copy = HEADS[model.config.family](model.config)
    copy.load_state_dict(weights)
    return copy
