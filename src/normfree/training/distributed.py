"""Coordination between the processes of one run, as torchrun starts them. With one process, nothing happens."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import TypeVar

import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

Value = TypeVar("Value")
logger = logging.getLogger("normfree")

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables from which Accelerate takes the number of processes."""


def start_processes(*, cpu: bool) -> PartialState:
    """Join the process group and return its state; log a warning if leftover variables make it wait for others."""
    sizes = [f"{name}={os.environ[name]}" for name in WORLD_SIZES if os.environ.get(name, "1") != "1"]
    if sizes and "TORCHELASTIC_RUN_ID" not in os.environ:  # set by torchrun
        logger.warning(
            "waiting for the other processes, because %s: start them all with torchrun, or unset it to train in one",
            ", ".join(sizes),
        )
    return PartialState(cpu=cpu, timeout=timedelta(days=1))  # preparing a corpus may take hours


def broadcast_from_rank_zero(value: Value) -> Value:
    """Return rank 0's value in every process. Files may change while processes look at them, so rank 0 decides."""
    (agreed,) = broadcast_object_list([value])
    return agreed


def highest_of_all_processes(number: int, device: torch.device) -> int:
    """Return the maximum of `number` over all processes."""
    if not torch.distributed.is_initialized():
        return number
    highest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return int(highest)
