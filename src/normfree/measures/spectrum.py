"""Spectra of feed-forward features before and after the nonlinearity (NerVE)."""

# N tokens, F features

import math

import torch
from torch import Tensor, nn

from normfree.measures.reading import FeatureMeasure

BEFORE_AND_AFTER = ("spectral_entropy", "participation_ratio", "early_enrichment")


class Spectrum(FeatureMeasure):
    """How the variance of feed-forward features spreads over directions, before and after the nonlinearity.

    From the eigenvalues of the covariance over all tokens of a measurement, as shares p of their sum in falling order:
    entropy -sum p ln p, participation ratio 1 / sum p^2, early enrichment sum_k (cum_k - k/F) / (F/2), and the
    Jensen-Shannon divergence of the two spectra (NerVE, arXiv 2603.06922). Second moments are added up in float64,
    which takes 16 F^2 bytes a layer. Fewer tokens than features cap the ratio: `tokens_per_feature` has their number.
    """

    gives = (
        *(f"{name}_{place}" for place in ("before", "after") for name in BEFORE_AND_AFTER),
        "spectral_divergence",
        "tokens_per_feature",
    )

    def read_before(self, layer: int, features_NF: Tensor) -> None:
        self.add(layer, before=_moment(features_NF))

    def read_after(self, layer: int, features_NF: Tensor) -> None:
        self.add(layer, after=_moment(features_NF))

    def values(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        before_F, after_F = _spectrum(before), _spectrum(after)
        shapes = [*_shape_of(before_F), *_shape_of(after_F), _divergence(before_F, after_F)]
        return dict(zip(self.gives, [*shapes, before[-1, -1] / len(after_F)], strict=True))


def _moment(features_NF: Tensor) -> Tensor:
    """(F + 1, F + 1) float64 second moment; the last column is of ones, so it has the sums and the number of tokens."""
    ones_NG = nn.functional.pad(features_NF.double(), (0, 1), value=1.0)
    return ones_NG.mT @ ones_NG


def _spectrum(moment_GG: Tensor) -> Tensor:
    """Eigenvalues of the covariance as shares of their sum, falling; NaN if a feature is not finite."""
    mean_F = moment_GG[-1, :-1] / moment_GG[-1, -1]
    covariance_FF = moment_GG[:-1, :-1] / moment_GG[-1, -1] - mean_F.outer(mean_F)
    if not covariance_FF.isfinite().all():
        return torch.full_like(mean_F, torch.nan)
    values_F = torch.linalg.eigvalsh(covariance_FF).flip(0).clamp(min=0)  # rounding makes small ones negative
    return values_F / values_F.sum()


def _shape_of(share_F: Tensor) -> list[Tensor]:
    """Entropy, participation ratio and early enrichment."""
    width = len(share_F)
    uniform_F = torch.arange(1, width + 1) / width
    enrichment = (share_F.cumsum(0) - uniform_F).sum() / (width / 2)
    return [torch.special.entr(share_F).sum(), 1 / share_F.square().sum(), enrichment]


def _divergence(before_F: Tensor, after_F: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two spectra, in [0, ln 2]."""
    entropy = [torch.special.entr(share).sum() for share in ((before_F + after_F) / 2, before_F, after_F)]
    return (entropy[0] - (entropy[1] + entropy[2]) / 2).clamp(0.0, math.log(2))
