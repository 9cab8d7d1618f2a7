"""bf16 matrix products where the processor has no bf16 units: fp32 units, same rounding.

A bf16 unit multiplies bf16 operands, sums in fp32 and rounds the sum to bf16. fp32 units do the same when the operands
are widened first, which is exact; only the order of the sum differs. With torch's own bf16 kernels for such processors
a training step takes about thirteen times as long (docs/performance.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger("normfree")

_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
}
"""What linear layers, attention written out and the loss become, forward and backward."""


def has_bf16_units() -> bool:
    """True where torch has bf16 kernels made for this processor."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def needs_fp32_units(precision: str, device: torch.device) -> bool:
    """True for bf16 on a CPU without bf16 units."""
    return precision == "bf16" and device.type == "cpu" and not has_bf16_units()


class ProductsInFp32(TorchDispatchMode):
    """Context manager: bf16 matrix products on the CPU are computed by fp32 units and rounded once, to bf16.

    Holds for the thread that enters it, backward passes included. torch.compile compiles nothing inside.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and args[0].dtype == torch.bfloat16 and args[0].device.type == "cpu":
            return func(*(factor.float() for factor in args), **kwargs).bfloat16()
        return func(*args, **kwargs)


def products_for(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """ProductsInFp32 where `needs_fp32_units`, said in the log; else nothing."""
    if not needs_fp32_units(precision, device):
        return nullcontext()
    logger.info("this processor has no bf16 units: its fp32 units compute bf16 products, rounded alike")
    return ProductsInFp32()
