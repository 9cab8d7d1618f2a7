"""The residual stream before each block: its size, what the branches add, outliers, and how alike its tokens are."""

# B sequences, T tokens, N tokens but padding, E hidden size

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normfree.measures.histogram import INFINITE, float_counts, quantiles
from normfree.measures.places import Label, places_of
from normfree.measures.reading import StreamMeasure, real_tokens

logger = logging.getLogger("normfree")

BRANCHES = ("attention", "feed_forward")
MASSIVE = (100, 1000)  # an activation is massive if it is above so many medians (Sun et al., arXiv 2402.17762)


class Residual(StreamMeasure):
    """Sizes of the residual stream before each block and of what its branches add, over all tokens but padding.

    Sums are in float64. The median of |x| and the counts above it come from one histogram of all passes, whose bins are
    0.4 % wide (`float_counts`); those of a token are exact, the middle of two as numpy's, of tokens that are not 0.
    Branches that are not found are left out with a warning. Raises ValueError for a model whose blocks are not found or
    whose stream cannot be read as sequences of tokens (`unreadable` in places.yaml).
    """

    gives = (
        *("residual_rms", "attention_rms", "feed_forward_rms", "attention_to_stream", "feed_forward_to_stream"),
        *("feature_size_kurtosis", "largest_activation", "median_activation", "largest_to_median"),
        *(f"activations_over_{medians}_medians" for medians in MASSIVE),
        "largest_to_median_of_token",
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        try:
            self._places = places_of(model)
            if any(place.attention is None or place.feed_forward is None for place in self._places):
                raise ValueError(f"in {type(model).__name__} it is the output of no module")
        except ValueError as error:
            logger.warning("what attention and feed-forward parts add is left out: %s", error)
            self._places = []

    def attach(self) -> Iterator[AbstractContextManager[Any]]:
        yield from super().attach()
        for layer, place in enumerate(self._places):
            for part, module in zip(BRANCHES, (place.attention, place.feed_forward), strict=True):
                assert module is not None
                yield place.read_added(module, partial(self._read_added, part, layer, place.label))

    def read_stream(self, layer: int, stream_BTE: Tensor, mask_BT: Tensor | None) -> None:
        stream_NE = real_tokens(stream_BTE, mask_BT).float()
        if not len(stream_NE):
            return
        sizes_NE, width = stream_NE.abs(), stream_NE.shape[1]
        self.add(layer, counts=float_counts(sizes_NE), tokens=len(stream_NE))
        sorted_NE = _sort(sizes_NE)
        largest_N, median_N = sorted_NE[:, -1], sorted_NE[:, (width - 1) // 2 : width // 2 + 1].mean(1)
        has_length_N = largest_N != 0  # a class token may begin at 0
        ratios_N = (largest_N / median_N)[has_length_N]
        self.add(layer, ratios=ratios_N.sum(dtype=torch.float64), with_ratio=has_length_N.sum())
        self.add(layer, squares=stream_NE.square().sum(0, dtype=torch.float64))
        self.raise_to(layer, largest=largest_N.amax())

    def _read_added(self, part: str, layer: int, label: Label, added: Tensor) -> None:
        added_NE = real_tokens(added.detach(), self.mask_of(label)).float()
        if len(added_NE):
            self.add(layer, **{part: added_NE.square().sum(dtype=torch.float64)})

    def values(self, squares: Tensor, tokens: Tensor, counts: Tensor, **kept: Tensor) -> dict[str, Tensor]:
        rms = (squares.sum() / (tokens * len(squares))).sqrt()
        [median] = quantiles(counts, [0.5])
        values = {
            "residual_rms": rms,
            "feature_size_kurtosis": squares.square().mean() / squares.mean().square(),  # mean s^4 / (mean s^2)^2
            "largest_activation": kept["largest"],
            "median_activation": median,
            "largest_to_median": kept["largest"] / median,
            "largest_to_median_of_token": kept["ratios"] / kept["with_ratio"],
        }
        for part in BRANCHES if self._places else ():
            values[f"{part}_rms"] = (kept[part] / (tokens * len(squares))).sqrt()
            values[f"{part}_to_stream"] = values[f"{part}_rms"] / rms
        sizes_B = ((torch.arange(INFINITE) << 16) | 0x8000).to(torch.int32).view(torch.float32).double()
        sizes_B = torch.cat([sizes_B, torch.tensor([torch.inf])])  # the middles of the bins
        for medians in MASSIVE:
            count = counts[: len(sizes_B)][sizes_B > medians * median].sum().double()
            values[f"activations_over_{medians}_medians"] = count.masked_fill(median.isnan(), torch.nan)
        return values


def _sort(values_NE: Tensor) -> Tensor:
    """Each row in rising order, NaN last; on the CPU in place, by numpy in a 70th of torch's time at E = 128."""
    if values_NE.device.type != "cpu":
        return values_NE.sort(-1).values
    values_NE.numpy().sort(-1)
    return values_NE


class Propagation(StreamMeasure):
    """Likeness of the tokens of a sequence, rank collapse and effective rank of the stream before each block.

    In float64 and without a T x T matrix: the sum of all x_i x_j is |sum of x|^2. A token that is 0 has no cosine. The
    effective rank is exp(-sum p ln p), p the singular values of all tokens together, over their sum. They are roots of
    the eigenvalues of the second moment (8 E^2 bytes a layer), rounding below 1e-8 of the largest.
    """

    gives = ("token_cosine", "token_correlation", "rank_collapse_residual", "effective_rank")

    def read_stream(self, layer: int, stream_BTE: Tensor, mask_BT: Tensor | None) -> None:
        stream_BTE = stream_BTE.double()
        tokens_NE = real_tokens(stream_BTE, mask_BT)
        real_BT1 = (torch.ones_like(stream_BTE[..., 0]) if mask_BT is None else mask_BT)[..., None] != 0
        tokens_B = real_BT1.sum((1, 2))
        stream_BTE = stream_BTE.where(real_BT1, 0.0)
        norms_BT1 = stream_BTE.norm(dim=-1, keepdim=True)
        has_length_BT1 = norms_BT1 != 0  # a class token may begin at 0
        directions_BTE = (stream_BTE / norms_BT1).where(has_length_BT1, 0.0)
        directed_B = has_length_BT1.sum((1, 2))
        mean_B1E = stream_BTE.sum(1, keepdim=True) / tokens_B[:, None, None]
        residual_BTE = (stream_BTE - mean_B1E).where(real_BT1, 0.0)
        residuals_B = residual_BTE.norm(dim=(1, 2)) / stream_BTE.norm(dim=(1, 2))
        self.add(layer, moment=tokens_NE.mT @ tokens_NE, tokens=tokens_B.sum(), sequences=(tokens_B > 0).sum())
        self.add(layer, pairs=(tokens_B * (tokens_B - 1)).sum(), residuals=residuals_B[tokens_B > 0].sum())
        self.add(layer, cosines=_sum_over_pairs(directions_BTE), products=_sum_over_pairs(stream_BTE))
        self.add(layer, directed_pairs=(directed_B * (directed_B - 1)).sum())

    def values(self, moment: Tensor, **sums: Tensor) -> dict[str, Tensor]:
        pairs, directed_pairs = (  # none in sequences of one token
            sums[name].double().masked_fill(sums[name] == 0, torch.nan) for name in ("pairs", "directed_pairs")
        )
        return {
            "token_cosine": sums["cosines"] / directed_pairs,
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
