"""Processes that train: settings of each one, and what the processes of one run agree on."""

import ctypes
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import datasets
import huggingface_hub
import torch.distributed
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from normfree.training.precision import check_fp32_variables, use_fp32_products

Value = TypeVar("Value")
logger = logging.getLogger("normfree")

# Names and numbers of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST_INT = 2**31 - 1


def prepare_process() -> None:
    """Keep fp32 products in fp32 and freed memory, and silence the libraries' bars; only commands call this."""
    check_fp32_variables()
    use_fp32_products()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # hides its retries without a network
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Stop glibc from returning freed blocks to the system: each step would pay page faults to get them back."""
    if platform.libc_ver()[0] == "glibc":
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST_INT), (M_TOP_PAD, 64 * 2**20)):
            ctypes.CDLL(None).mallopt(name, value)


@contextmanager
def guard_process_variables() -> Iterator[None]:
    """Hide ACCELERATE_* variables, which may train fp32 in bf16."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    if variables:
        words = ", ".join(f"{name}={value}" for name, value in sorted(variables.items()))
        logger.warning("ignored, because the run's own keys decide: %s", words)
    try:
        for name in variables:
            del os.environ[name]
        yield
    finally:
        os.environ.update(variables)


def training_device() -> torch.device:
    return cast(torch.device, PartialState().device)


def broadcast_from_rank_zero(value: Value) -> Value:
    """Return rank 0's value in every process. Files may change while processes look at them, so rank 0 decides."""
    (agreed,) = broadcast_object_list([value])
    return agreed


def highest_of_all_processes(number: int, device: torch.device) -> int:
    if not torch.distributed.is_initialized():
        return number
    highest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return int(highest)
