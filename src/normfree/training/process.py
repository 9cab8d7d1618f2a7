"""Settings of a process that loads or trains models: fp32 precision, memory allocation, log noise.

Only commands call `prepare_process`; importing the library changes nothing.
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

FP32_VARIABLES = {
    "NVIDIA_TF32_OVERRIDE": "0",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "DNNL_DEFAULT_FPMATH_MODE": "STRICT",
}
"""Variables that override torch's precision in cuBLAS, cuDNN and oneDNN, with the value that keeps fp32."""


def prepare_process() -> None:
    """Keep fp32 products in fp32, keep freed memory, and silence the libraries' progress bars."""
    check_fp32_variables()
    use_fp32_products()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # hides its retries without a network
    if keep_freed_memory():
        logger.debug("glibc keeps freed memory in this process: faster steps (docs/performance.md)")


def use_fp32_products() -> None:
    """Turn TF32 off for this process.

    The first line undoes TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which some images set, and Accelerate's choice for
    compiled fp32; the second undoes the choice of TrainingArguments for compiled bf16.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "ieee"  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def restore_fp32_precision() -> Iterator[None]:
    """Restore torch's fp32 precision settings at the end; torch.export fails in a process that changed them."""
    backends: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def check_fp32_variables() -> None:
    """Raise ValueError if an environment variable makes libraries compute fp32 products in less than fp32."""
    for name, harmless in FP32_VARIABLES.items():
        if os.environ.get(name, harmless).upper() != harmless:
            raise ValueError(f"{name}={os.environ[name]} lowers the precision of fp32 products: unset it")


@contextmanager
def hide_accelerate_variables() -> Iterator[None]:
    """Hide ACCELERATE_* variables: ACCELERATE_MIXED_PRECISION=bf16 would train an fp32 run in bf16."""
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


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed blocks to the system; True if it did.

    By default glibc returns blocks above 128 KiB at once, and each training step pays the page faults to get them back.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST_INT), (M_TOP_PAD, 64 * 2**20))
    return [mallopt(name, value) for name, value in settings] == [1, 1, 1]
