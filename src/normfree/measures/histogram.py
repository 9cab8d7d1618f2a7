"""Histograms of floating-point numbers by their leading bits: one pass, no range to choose beforehand."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BINS = 2**16  # of `float_counts`: sign, exponent and 7 bits of the fraction of a float32
INFINITE, NEGATIVE_INFINITE = 0x7F80, 0xFF80  # the bins of infinity and its negative
_ORDER = np.r_[BINS - 1 : BINS // 2 - 1 : -1, 0 : BINS // 2]  # bins from the most negative on
_VALUES = ((_ORDER << 16) | 0x8000).astype(np.uint32).view(np.float32)  # their middles
_VALUES[_ORDER == INFINITE], _VALUES[_ORDER == NEGATIVE_INFINITE] = np.inf, -np.inf
AT_ONCE = 2**19  # codes that are counted at once on a CPU: numpy makes 8 bytes of each


def counts_of(codes: Tensor, size: int) -> Tensor:
    """(size,) int64: how often each of 0 .. size - 1 occurs among integer codes of any shape, on their device."""
    if codes.device.type != "cpu":
        return torch.bincount(codes.reshape(-1).long(), minlength=size)
    flat, counts = codes.numpy().reshape(-1), np.zeros(size, dtype=np.int64)
    for start in range(0, len(flat), AT_ONCE):  # numpy's counting is four times as fast as torch's on a CPU
        counts += np.bincount(flat[start : start + AT_ONCE], minlength=size)
    return torch.from_numpy(counts)


def counts_of_columns(codes_NF: Tensor, size: int) -> Tensor:
    """(F, size) int64: how often each of 0 .. size - 1 occurs in each column of int32 codes."""
    width = codes_NF.shape[1]
    offsets_F = torch.arange(0, width * size, size, dtype=torch.int32, device=codes_NF.device)
    return counts_of(codes_NF + offsets_F, width * size).view(width, size)


def float_counts(values: Tensor) -> Tensor:
    """(BINS,) int64: how many values have each pattern of the 16 leading bits of a float32."""
    halves = values.float().contiguous().view(-1).view(torch.int16)[1::2]  # little endian: the second is the leading
    if halves.device.type == "cpu":
        return counts_of(halves.view(torch.uint16), BINS)
    return counts_of(halves.int() & 0xFFFF, BINS)


def quantiles(counts_B: Tensor, shares: Sequence[float]) -> Tensor:
    """For each share, in float64, the smallest of the values that at least this share of them does not exceed.

    It is the middle of a bin, so within 2^-8 (0.4 %). NaN if a value is, or without any.
    """
    counts = counts_B.cpu().numpy()[_ORDER]
    below = counts.cumsum()
    places = np.searchsorted(below, [max(1, math.ceil(share * below[-1])) for share in shares])
    is_known = below[-1] > 0 and not counts[np.isnan(_VALUES)].any()
    return torch.tensor(_VALUES[places] if is_known else [math.nan] * len(shares), dtype=torch.float64)
