"""The residual stream before each block: its size, what the branches add, outlying features and activations."""

# N tokens, E hidden size

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from normfree.entropy.statistics import over_processes
from normfree.measures.features import real_tokens
from normfree.measures.histogram import BINS, INFINITE, float_counts, quantiles
from normfree.measures.measure import Total, merged
from normfree.measures.places import Label, places_of
from normfree.measures.stream import StreamMeasure

logger = logging.getLogger("normfree")

BRANCHES = ("attention", "feed_forward")
MASSIVE = (100, 1000)
"""An activation is massive if it is above so many medians (Sun et al., arXiv 2402.17762)."""


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
        layers = len(self.blocks)
        self._squares = [torch.zeros(1, dtype=torch.float64)] * layers  # (E,) each
        self._tokens = torch.zeros(layers, dtype=torch.int64)
        self._added = {part: torch.zeros(2, layers, dtype=torch.float64) for part in BRANCHES}  # squares and numbers
        self._counts = torch.zeros(layers, BINS, dtype=torch.int64)
        self._largest = torch.full((layers,), -torch.inf, dtype=torch.float64)
        self._ratios = torch.zeros(layers, dtype=torch.float64)

    def attach(self) -> ExitStack:
        hooks = super().attach()
        for layer, place in enumerate(self._places):
            for part, module in zip(BRANCHES, (place.attention, place.feed_forward), strict=True):
                assert module is not None
                hooks.callback(place.read_added(module, partial(self._read_added, part, layer, place.label)).remove)
        return hooks

    def read_stream(self, layer: int, stream_BTE: Tensor, mask_BT: Tensor | None) -> None:
        stream_NE = real_tokens(stream_BTE, mask_BT).float()
        if not len(stream_NE):
            return
        sizes_NE, width = stream_NE.abs(), stream_NE.shape[1]
        self._counts[layer] += float_counts(sizes_NE).cpu()
        sorted_NE = _sort(sizes_NE)
        largest_N, median_N = sorted_NE[:, -1], sorted_NE[:, (width - 1) // 2 : width // 2 + 1].mean(1)
        self._squares[layer] = self._squares[layer] + stream_NE.square().sum(0, dtype=torch.float64).cpu()
        self._tokens[layer] += len(stream_NE)
        self._largest[layer] = torch.maximum(self._largest[layer], largest_N.amax().double().cpu())
        self._ratios[layer] += (largest_N / median_N).sum(dtype=torch.float64).cpu()

    def _read_added(self, part: str, layer: int, label: Label, added: Tensor) -> None:
        added_NE = real_tokens(added.detach(), self.mask_of(label)).float()
        self._added[part][0, layer] += added_NE.square().sum(dtype=torch.float64).cpu()
        self._added[part][1, layer] += added_NE.numel()

    def totals(self) -> dict[str, Total]:
        numbers_L = self._tokens * torch.tensor([len(squares_E) for squares_E in self._squares])
        totals: dict[str, Total] = {
            "residual_rms": (torch.stack([squares_E.sum() for squares_E in self._squares]), numbers_L),
            "largest_activation": self._largest.where(self._tokens > 0, torch.nan),
            "largest_to_median_of_token": (self._ratios, self._tokens),
        }
        if self._places:
            totals |= {f"{part}_rms": (squares_L, numbers_L) for part, (squares_L, numbers_L) in self._added.items()}
        return totals

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        totals = self.totals()
        rms_L = merged("root of the mean", totals["residual_rms"], device)
        values = {"feature_size_kurtosis": torch.stack([_kurtosis(over_processes(s, device)) for s in self._squares])}
        for part in BRANCHES if self._places else ():
            values[f"{part}_to_stream"] = merged("root of the mean", totals[f"{part}_rms"], device) / rms_L
        counts_LB = over_processes(self._counts, device)
        [median_L] = quantiles(counts_LB, [0.5])
        largest_L = merged("maximum", totals["largest_activation"], device)
        values |= {"median_activation": median_L, "largest_to_median": largest_L / median_L}
        sizes_B = ((torch.arange(INFINITE) << 16) | 0x8000).to(torch.int32).view(torch.float32).double()
        sizes_B = torch.cat([sizes_B, torch.tensor([torch.inf])])  # the middles of the bins
        for medians in MASSIVE:
            over_LB = sizes_B > medians * median_L[:, None]
            count_L = (counts_LB[:, : len(sizes_B)] * over_LB).sum(1).double()
            values[f"activations_over_{medians}_medians"] = count_L.masked_fill(median_L.isnan(), torch.nan)
        return values


def _sort(values_NE: Tensor) -> Tensor:
    """Each row in rising order, NaN last; on the CPU in place, by numpy in a 70th of torch's time at E = 128."""
    if values_NE.device.type != "cpu":
        return values_NE.sort(-1).values
    values_NE.numpy().sort(-1)
    return values_NE


def _kurtosis(squares_E: Tensor) -> Tensor:
    """mean s^4 / (mean s^2)^2, from s^2 times any factor; NaN without tokens."""
    return squares_E.square().mean() / squares_E.mean().square()
