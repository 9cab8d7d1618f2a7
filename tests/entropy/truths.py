"""Independent truths: numpy in float64, sharing no code with the library."""

from __future__ import annotations

import numpy as np
import torch


def entropy_by_numpy(scores_BHTS: np.ndarray, visible_BHTS: np.ndarray) -> np.ndarray:
    """-sum p ln p of every row over its visible keys, from scratch; NaN where a row sees nothing."""
    shape = np.broadcast_shapes(scores_BHTS.shape, visible_BHTS.shape)
    scores_BHTS, visible_BHTS = np.broadcast_to(scores_BHTS, shape), np.broadcast_to(visible_BHTS, shape)
    out = np.full(shape[:-1], np.nan)
    for row in np.ndindex(*shape[:-1]):
        scores = scores_BHTS[row][visible_BHTS[row]].astype(np.float64)
        if scores.size:
            p = np.exp(scores - scores.max())
            p /= p.sum()
            out[row] = -(p[p > 0] * np.log(p[p > 0])).sum()
    return out


def scores_by_numpy(q: torch.Tensor, k: torch.Tensor, scale: float) -> np.ndarray:
    """scale q.k in float64, key heads repeated for grouped queries."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return np.einsum("bhtd,bhsd->bhts", q.double().numpy(), k.double().numpy()) * scale


def causal_by_numpy(queries: int, keys: int) -> np.ndarray:
    """(1, 1, T, S) bool: the last query sees every key."""
    return (np.arange(keys)[None] <= np.arange(queries)[:, None] + keys - queries)[None, None]
