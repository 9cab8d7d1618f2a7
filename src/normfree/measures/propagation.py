"""Signal propagation: how alike the tokens of a sequence are before each block, and how many directions they take."""

# B sequences, T tokens, N tokens but padding, E hidden size, L layers

from __future__ import annotations

import torch
from torch import Tensor

from normfree.measures.reading import StreamMeasure, real_tokens


class Propagation(StreamMeasure):
    """Likeness of the tokens of a sequence, rank collapse and effective rank of the stream before each block.

    No T x T matrix is made: the sum of all x_i x_j is |sum of x|^2. Everything is in float64. The effective rank is
    exp(-sum p ln p), p the singular values of all tokens of a measurement together, over their sum. They are roots of
    the eigenvalues of the second moment, which takes 8 E^2 bytes a layer; below 1e-8 of the largest they are rounding.
    Raises ValueError for a model without a list of blocks.
    """

    gives = ("token_cosine", "token_correlation", "rank_collapse_residual", "effective_rank")

    def read_stream(self, layer: int, stream_BTE: Tensor, mask_BT: Tensor | None) -> None:
        stream_BTE = stream_BTE.double()
        tokens_NE = real_tokens(stream_BTE, mask_BT)
        real_BT1 = (torch.ones_like(stream_BTE[..., 0]) if mask_BT is None else mask_BT)[..., None] != 0
        tokens_B = real_BT1.sum((1, 2))
        stream_BTE = stream_BTE.where(real_BT1, 0.0)
        directions_BTE = (stream_BTE / stream_BTE.norm(dim=-1, keepdim=True)).where(real_BT1, 0.0)
        mean_B1E = stream_BTE.sum(1, keepdim=True) / tokens_B[:, None, None]
        residual_BTE = (stream_BTE - mean_B1E).where(real_BT1, 0.0)
        residuals_B = residual_BTE.norm(dim=(1, 2)) / stream_BTE.norm(dim=(1, 2))
        self.add(layer, moment=tokens_NE.mT @ tokens_NE, tokens=tokens_B.sum(), sequences=(tokens_B > 0).sum())
        self.add(layer, pairs=(tokens_B * (tokens_B - 1)).sum(), residuals=residuals_B[tokens_B > 0].sum())
        self.add(layer, cosines=_sum_over_pairs(directions_BTE), products=_sum_over_pairs(stream_BTE))

    def values(self, moment: Tensor, **sums: Tensor) -> dict[str, Tensor]:
        pairs = sums["pairs"].double().masked_fill(sums["pairs"] == 0, torch.nan)  # sequences of one token
        return {
            "token_cosine": sums["cosines"] / pairs,
            "token_correlation": sums["products"] / pairs / (moment.trace() / sums["tokens"]),
            "rank_collapse_residual": sums["residuals"] / sums["sequences"],
            "effective_rank": _effective_rank(moment),
        }


def _sum_over_pairs(vectors_BTE: Tensor) -> Tensor:
    """Sum of x_i x_j over all sequences and pairs of different tokens of each."""
    return vectors_BTE.sum(1).square().sum() - vectors_BTE.square().sum()


def _effective_rank(moment_EE: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007); NaN unless all is finite."""
    if not moment_EE.isfinite().all():
        return moment_EE.new_tensor(torch.nan)
    singular_E = torch.linalg.eigvalsh(moment_EE).clamp(min=0).sqrt()  # rounding makes small eigenvalues negative
    return torch.special.entr(singular_E / singular_E.sum()).sum().exp()
