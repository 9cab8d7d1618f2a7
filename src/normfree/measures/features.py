"""What enters and leaves the nonlinearity of every feed-forward part."""

# B batch, T tokens, N tokens of a pass but padding, F features

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from normfree.measures.measure import Measure, Total
from normfree.measures.places import places_of


class FeatureMeasure(Measure):
    """Base of measures of feed-forward features, a layer a place in `places_of(model)`.

    A subclass overrides `read_before` or `read_after`. Raises ValueError for a model whose feed-forward parts are not
    found.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.places = places_of(model)

    def attach(self) -> ExitStack:
        hooks = ExitStack()
        for layer, place in enumerate(self.places):
            before, after = partial(self._before, layer, place.width), partial(self._after, layer)
            hooks.callback(place.reads.register_forward_hook(before).remove)
            hooks.callback(place.writes.register_forward_pre_hook(after).remove)
        return hooks

    def _before(self, layer: int, width: int, _linear: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        self.read_before(layer, real_tokens(output.detach()[..., :width], self.mask_of(self.places[layer].label)))

    def _after(self, layer: int, _linear: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.read_after(layer, real_tokens(inputs[0].detach(), self.mask_of(self.places[layer].label)))

    def read_before(self, layer: int, features_NF: Tensor) -> None:
        """Read what enters the nonlinearity; `layer` counts `places`."""

    def read_after(self, layer: int, features_NF: Tensor) -> None:
        """Read the activated features, in a gated part the product."""

    def totals(self) -> dict[str, Total]:
        return {}

    @property
    def layers(self) -> list[int | str]:
        return [place.label for place in self.places]


def real_tokens(features: Tensor, mask_BT: Tensor | None) -> Tensor:
    """(N, F) features of all tokens but padding, from (..., F)."""
    features_NF = features.reshape(-1, features.shape[-1])
    if mask_BT is None:
        return features_NF
    if mask_BT.numel() != len(features_NF):
        raise ValueError(f"a mask of shape {tuple(mask_BT.shape)} does not fit {len(features_NF)} tokens of a layer")
    return features_NF[mask_BT.flatten() != 0]


def added(sums: list[Tensor | None], layer: int, more: Tensor) -> None:
    """Add to the sum of a layer, on the CPU; None is nothing so far."""
    before = sums[layer]
    sums[layer] = more.cpu() if before is None else before + more.cpu()


def complete(sums: list[Tensor | None]) -> list[Tensor]:
    """The sums of all layers. Raises ValueError if a layer has none."""
    if missing := [layer for layer, each in enumerate(sums) if each is None]:
        raise ValueError(f"no forward pass reached layer {missing[0]}; run one inside the `with` block")
    return [each for each in sums if each is not None]
