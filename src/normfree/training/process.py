"""What a process that loads or trains models sets once. Only commands call this: importing the library changes nothing.

By default glibc hands blocks of more than 128 KiB back to the system at once, and a training step, which frees and asks
for the same blocks again and again, pays the page faults to get them back.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import huggingface_hub
import torch
import transformers

logger = logging.getLogger("normfree")

# Names and numbers of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST_INT = 2**31 - 1

TRUE_PRODUCTS = {
    "NVIDIA_TF32_OVERRIDE": "0",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "DNNL_DEFAULT_FPMATH_MODE": "STRICT",
}
"""Variables that cuBLAS, cuDNN and oneDNN put above what a program says, with the value that leaves fp32 as it is."""


def prepare_process() -> None:
    """Keep fp32 products and freed memory, and silence the bars of the libraries underneath, which would drown ours."""
    refuse_other_products()
    keep_fp32_products()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries without a network; our error says what failed
    if keep_freed_memory():
        logger.info("glibc keeps freed memory in this process: faster steps (docs/performance.md)")


def keep_fp32_products() -> None:
    """Products of fp32 tensors are fp32 from here on, never TF32.

    The first line undoes TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which some images set, and what Accelerate does where it
    compiles in fp32; the second what TrainingArguments does where it compiles in bf16.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "ieee"  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def products_as_before() -> Iterator[None]:
    """Give back the precision of fp32 products: after it was set, torch.export fails in the same process."""
    places: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def refuse_other_products() -> None:
    """Raises ValueError for a variable by which libraries would multiply fp32 in less, whatever torch is told."""
    for name, harmless in TRUE_PRODUCTS.items():
        if os.environ.get(name, harmless).upper() != harmless:
            raise ValueError(f"{name}={os.environ[name]} would make fp32 products less than fp32: unset it")


@contextmanager
def without_accelerate_variables() -> Iterator[None]:
    """Hide ACCELERATE_*: ACCELERATE_MIXED_PRECISION=bf16 would train an fp32 run in bf16."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    unset = ("", "no", "false", "0")
    told = [f"{name}={value}" for name, value in sorted(variables.items()) if value.lower() not in unset]
    if told:
        logger.warning("not read, since the keys of a run decide: %s", ", ".join(told))
    try:
        for name in variables:
            del os.environ[name]
        yield
    finally:
        os.environ.update(variables)


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed blocks before the process ends; True where that took effect."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST_INT), (M_TOP_PAD, 64 * 2**20))
    return [mallopt(name, value) for name, value in settings] == [1, 1, 1]
