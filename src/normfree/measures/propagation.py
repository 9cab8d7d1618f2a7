"""Signal propagation: how alike the tokens of a sequence are before each block, and how many directions they take."""

# B sequences, T tokens, N tokens but padding, E hidden size, L layers

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfree.entropy.statistics import over_processes
from normfree.measures.features import added, real_tokens
from normfree.measures.measure import Total
from normfree.measures.stream import StreamMeasure


class Propagation(StreamMeasure):
    """Likeness of the tokens of a sequence, rank collapse and effective rank of the stream before each block.

    No T x T matrix is made: the sum of all x_i x_j is |sum of x|^2. Everything is in float64. The effective rank is
    exp(-sum p ln p), p the singular values of all tokens of a measurement together, over their sum. They are roots of
    the eigenvalues of the second moment, which takes 8 E^2 bytes a layer; below 1e-8 of the largest they are rounding.
    Raises ValueError for a model without a list of blocks.
    """

    gives = ("token_cosine", "token_correlation", "rank_collapse_residual", "effective_rank")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        layers = len(self.blocks)
        self._moments: list[Tensor | None] = [None] * layers
        self._tokens, self._pairs, self._sequences = torch.zeros(3, layers, dtype=torch.int64)
        self._cosines, self._products, self._residuals = torch.zeros(3, layers, dtype=torch.float64)

    def read_stream(self, layer: int, stream_BTE: Tensor, mask_BT: Tensor | None) -> None:
        stream_BTE = stream_BTE.double()
        tokens_NE = real_tokens(stream_BTE, mask_BT)
        added(self._moments, layer, tokens_NE.mT @ tokens_NE)
        real_BT1 = (torch.ones_like(stream_BTE[..., 0]) if mask_BT is None else mask_BT)[..., None] != 0
        tokens_B = real_BT1.sum((1, 2))
        self._tokens[layer] += len(tokens_NE)
        self._pairs[layer] += (tokens_B * (tokens_B - 1)).sum().cpu()
        self._sequences[layer] += (tokens_B > 0).sum().cpu()
        stream_BTE = stream_BTE.where(real_BT1, 0.0)
        directions_BTE = (stream_BTE / stream_BTE.norm(dim=-1, keepdim=True)).where(real_BT1, 0.0)
        self._cosines[layer] += _sum_over_pairs(directions_BTE)
        self._products[layer] += _sum_over_pairs(stream_BTE)
        mean_B1E = stream_BTE.sum(1, keepdim=True) / tokens_B[:, None, None]
        residual_BTE = (stream_BTE - mean_B1E).where(real_BT1, 0.0)
        residuals_B = residual_BTE.norm(dim=(1, 2)) / stream_BTE.norm(dim=(1, 2))
        self._residuals[layer] += residuals_B[tokens_B > 0].sum().cpu()

    def totals(self) -> dict[str, Total]:
        return {
            "token_cosine": (self._cosines, self._pairs),
            "rank_collapse_residual": (self._residuals, self._sequences),
        }

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        unknown_EE = torch.full((1, 1), torch.nan, dtype=torch.float64)  # a block that no pass reached
        moments = [over_processes(unknown_EE if each is None else each, device) for each in self._moments]
        sums = (self._products, self._pairs, self._tokens)
        products_L, pairs_L, tokens_L = (over_processes(sum_L, device) for sum_L in sums)
        mean_square_L = torch.stack([moment_EE.trace() for moment_EE in moments]) / tokens_L
        return {
            "token_correlation": products_L / pairs_L / mean_square_L,
            "effective_rank": torch.stack([_effective_rank(moment_EE) for moment_EE in moments]),
        }


def _sum_over_pairs(vectors_BTE: Tensor) -> Tensor:
    """Sum of x_i x_j over all sequences and pairs of different tokens of each."""
    return (vectors_BTE.sum(1).square().sum() - vectors_BTE.square().sum()).cpu()


def _effective_rank(moment_EE: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007); NaN unless all is finite."""
    if not moment_EE.isfinite().all():
        return moment_EE.new_tensor(torch.nan)
    singular_E = torch.linalg.eigvalsh(moment_EE).clamp(min=0).sqrt()  # rounding makes small eigenvalues negative
    return torch.special.entr(singular_E / singular_E.sum()).sum().exp()
