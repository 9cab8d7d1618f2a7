"""Sparse and dead units of every feed-forward part."""

# N tokens, F features (units), E exponents

from __future__ import annotations

import torch
from torch import Tensor

from normfree.measures.histogram import counts_of
from normfree.measures.reading import FeatureMeasure

EXPONENTS = 256  # of a float32; the last is that of infinity and NaN
OCTAVES = 10  # a feature is small if it is below 2^-OCTAVES (about 1e-3) of its unit's largest


class Units(FeatureMeasure):
    """Shares of zero, small and dead among the activated features, over all tokens of a measurement.

    A unit's largest magnitude is known only at the end, so each unit keeps a histogram of its exponents, exact for
    magnitudes rounded down to powers of two. Raises ValueError for a model whose feed-forward parts are not found.
    """

    gives = ("zero_share", "small_share", "dead_share", "unit_tokens")

    def read_after(self, layer: int, features_NF: Tensor) -> None:
        features_NF = features_NF.float().contiguous()
        width = features_NF.shape[1]
        codes_NF = features_NF.view(torch.int32).bitwise_right_shift(23).bitwise_and_(EXPONENTS - 1)
        codes_NF += torch.arange(0, width * EXPONENTS, EXPONENTS, dtype=torch.int32, device=codes_NF.device)
        exponents_FE = counts_of(codes_NF, width * EXPONENTS).view(width, EXPONENTS)
        self.add(layer, exponents=exponents_FE, zeros=(features_NF == 0).sum(0), positive=(features_NF > 0).sum(0))

    def values(self, exponents: Tensor, zeros: Tensor, positive: Tensor) -> dict[str, Tensor]:
        tokens = exponents[0].sum().double()
        number_E = torch.arange(EXPONENTS)
        highest_F1 = (number_E * (exponents > 0)).amax(1, keepdim=True)
        small_F = (exponents * (number_E < highest_F1 - OCTAVES)).sum(1)
        shares = [zeros.double().mean() / tokens, small_F.double().mean() / tokens, (positive == 0).double().mean()]
        if exponents[:, -1].any():  # a NaN or infinity
            shares = [tokens * torch.nan] * 3
        return dict(zip(self.gives, [*shares, tokens], strict=True))
