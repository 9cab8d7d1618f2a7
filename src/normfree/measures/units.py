"""Sparse and dead units of every feed-forward part."""

# N tokens, F features (units), E exponents

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfree.entropy.statistics import over_processes
from normfree.measures.features import FeatureMeasure, added, complete
from normfree.measures.histogram import counts_of

EXPONENTS = 256
"""Exponents of a float32; the last is that of infinity and NaN."""
OCTAVES = 10
"""A feature is small if it is below 2^-OCTAVES (about 1e-3) of its unit's largest."""


class Units(FeatureMeasure):
    """Shares of zero, small and dead among the activated features, over all tokens of a measurement.

    A unit's largest magnitude is known only at the end, so each unit keeps a histogram of its exponents, exact for
    magnitudes rounded down to powers of two. Raises ValueError for a model whose feed-forward parts are not found.
    """

    gives = ("zero_share", "small_share", "dead_share", "unit_tokens")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._counts: list[Tensor | None] = [None] * len(self.places)  # (F, E + 2): exponents, zeros, positive features

    def read_after(self, layer: int, features_NF: Tensor) -> None:
        features_NF = features_NF.float().contiguous()
        width = features_NF.shape[1]
        codes_NF = features_NF.view(torch.int32).bitwise_right_shift(23).bitwise_and_(EXPONENTS - 1)
        codes_NF += torch.arange(0, width * EXPONENTS, EXPONENTS, dtype=torch.int32, device=codes_NF.device)
        exponents_FE = counts_of(codes_NF, width * EXPONENTS).view(width, EXPONENTS)
        columns = [exponents_FE, (features_NF == 0).sum(0)[:, None], (features_NF > 0).sum(0)[:, None]]
        added(self._counts, layer, torch.cat(columns, dim=1))

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        values_L4 = torch.stack([_shares(over_processes(counts, device)) for counts in complete(self._counts)])
        return dict(zip(self.gives, values_L4.unbind(1), strict=True))


def _shares(counts: Tensor) -> Tensor:
    """(4,) float64: the values of a layer, in the order of `Units.gives`."""
    exponents_FE, zeros_F, positive_F = counts[:, :EXPONENTS], counts[:, EXPONENTS], counts[:, EXPONENTS + 1]
    tokens = exponents_FE[0].sum().double()
    number_E = torch.arange(EXPONENTS)
    highest_F1 = (number_E * (exponents_FE > 0)).amax(1, keepdim=True)
    small_F = (exponents_FE * (number_E < highest_F1 - OCTAVES)).sum(1)
    shares = [zeros_F.double().mean() / tokens, small_F.double().mean() / tokens, (positive_F == 0).double().mean()]
    if exponents_FE[:, -1].any():  # a NaN or infinity
        shares = [tokens * torch.nan] * 3
    return torch.stack([*shares, tokens])
