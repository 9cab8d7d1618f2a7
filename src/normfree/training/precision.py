"""Precision of matrix products: fp32 without TF32, and bf16 on processors without bf16 units."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger("normfree")

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default}
"""The operators behind linear layers, eager attention and the loss, forward and backward."""
FP32_VARIABLES = {
    "NVIDIA_TF32_OVERRIDE": "0",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "DNNL_DEFAULT_FPMATH_MODE": "STRICT",
}
"""Variables that override torch's precision in cuBLAS, cuDNN and oneDNN, with the value that keeps fp32."""


def check_fp32_variables() -> None:
    """Raise ValueError if an environment variable makes libraries compute fp32 products in less than fp32."""
    for name, harmless in FP32_VARIABLES.items():
        if os.environ.get(name, harmless).upper() != harmless:
            raise ValueError(f"{name}={os.environ[name]} lowers the precision of fp32 products: unset it")


def use_fp32_products() -> None:
    """Turn TF32 off for this process."""
    # Undoes TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which some images set, and Accelerate's choice for compiled fp32;
    torch.set_float32_matmul_precision("highest")
    # undoes the choice of TrainingArguments for compiled bf16.
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


def has_bf16_units() -> bool:
    """True if torch has bf16 kernels for this processor."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def needs_fp32_units(precision: str, device: torch.device) -> bool:
    return precision == "bf16" and device.type == "cpu" and not has_bf16_units()


class ProductsInFp32(TorchDispatchMode):
    """Context manager that computes bf16 matrix products on the CPU in fp32 and rounds them to bf16.

    A bf16 unit multiplies bf16 operands, sums in fp32 and rounds the sum to bf16. fp32 units do the same on operands
    converted to fp32, which is exact; only the order of the sum differs. torch's own bf16 kernels for such processors
    make a training step about thirteen times slower (docs/performance.md). This covers the current thread, backward
    passes included; torch.compile compiles nothing inside.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and args[0].dtype == torch.bfloat16 and args[0].device.type == "cpu":
            return func(*(factor.float() for factor in args), **kwargs).bfloat16()
        return func(*args, **kwargs)


def products_for(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return a ProductsInFp32 if this device needs it, else a context manager that does nothing."""
    if not needs_fp32_units(precision, device):
        return nullcontext()
    logger.info("this processor has no bf16 units: bf16 products are computed in fp32 and rounded to bf16")
    return ProductsInFp32()
