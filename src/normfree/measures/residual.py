"""The residual stream before each block: its size, what the branches add, outlying features and activations."""

# N tokens, E hidden size

from __future__ import annotations

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
    0.4 % wide (`float_counts`); those of a token are exact, the middle of two as numpy's. Branches are left out, with a
    warning, in models whose branches are not found. Raises ValueError for a model without a list of blocks.
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
        self.add(layer, ratios=(largest_N / median_N).sum(dtype=torch.float64))
        self.add(layer, squares=stream_NE.square().sum(0, dtype=torch.float64))
        self.raise_to(layer, largest=largest_N.amax())

    def _read_added(self, part: str, layer: int, label: Label, added: Tensor) -> None:
        added_NE = real_tokens(added.detach(), self.mask_of(label)).float()
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
            "largest_to_median_of_token": kept["ratios"] / tokens,
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
