"""Bases of measures: what they read in a forward pass, layer by layer."""

# B batch, T tokens, N tokens of a pass but padding, E hidden size, F features

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn

from normfree.entropy.layers import HeadLayer, labels
from normfree.entropy.routing import AttentionCall
from normfree.entropy.tap import AttentionTap
from normfree.measures.measure import LayerMeasure
from normfree.measures.places import Label, blocks_of, places_of, stream_of


class StreamMeasure(LayerMeasure):
    """Base of measures of the residual stream before each block of `blocks_of(model)`, whose errors it raises."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.blocks = blocks_of(model)

    def attach(self) -> Iterator[AbstractContextManager[Any]]:
        for layer, (label, block) in enumerate(self.blocks.items()):
            yield block.register_forward_pre_hook(partial(self._read, layer, label), with_kwargs=True)

    def _read(self, layer: int, label: Label, _block: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        stream = stream_of(inputs, named).detach()
        stream = stream[None] if stream.dim() == 2 else stream  # patches of all images in one row
        self.read_stream(layer, stream.flatten(1, -2), self.mask_of(label))

    def read_stream(self, layer: int, stream_BTE: Tensor, mask_BT: Tensor | None) -> None:
        """Read the stream before a block; `layer` counts `blocks`, and the mask is 0 at padding."""

    @property
    def layers(self) -> list[Label]:
        return list(self.blocks)


class FeatureMeasure(LayerMeasure):
    """Base of measures of feed-forward features at each place of `places_of(model)`, whose errors it raises."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.places = places_of(model)

    def attach(self) -> Iterator[AbstractContextManager[Any]]:
        for layer, place in enumerate(self.places):
            yield place.reads.register_forward_hook(partial(self._before, layer, place.width))
            yield place.writes.register_forward_pre_hook(partial(self._after, layer))

    def _before(self, layer: int, width: int, _linear: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        output = output if isinstance(output, Tensor) else output[0]
        self.read_before(layer, real_tokens(output.detach()[..., :width], self.mask_of(self.places[layer].label)))

    def _after(self, layer: int, _linear: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.read_after(layer, real_tokens(inputs[0].detach(), self.mask_of(self.places[layer].label)))

    def read_before(self, layer: int, features_NF: Tensor) -> None:
        """Read what enters the nonlinearity; `layer` counts `places`."""

    def read_after(self, layer: int, features_NF: Tensor) -> None:
        """Read the activated features, in a gated part the product."""

    @property
    def layers(self) -> list[Label]:
        return [place.label for place in self.places]


class CallMeasure(LayerMeasure):
    """Base of measures of attention calls; a subclass keeps values of (H,) heads. Raises as `AttentionTap` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._tap = AttentionTap(model, self.read_call)

    def attach(self) -> list[AttentionTap]:
        return [self._tap]

    def read_call(self, layer: HeadLayer, call: AttentionCall) -> None:
        """Read a call before it is made."""

    def keys(self) -> list[HeadLayer]:
        return sorted({*self.sums, *self.maxima})  # pyright: ignore[reportArgumentType]

    @property
    def layers(self) -> list[Label]:
        return labels(self.keys())


def real_tokens(features: Tensor, mask_BT: Tensor | None) -> Tensor:
    """(N, F) features of all tokens but padding, from (..., F)."""
    features_NF = features.reshape(-1, features.shape[-1])
    if mask_BT is not None and mask_BT.numel() != len(features_NF):
        raise ValueError(f"a mask of shape {tuple(mask_BT.shape)} does not fit {len(features_NF)} tokens of a layer")
    return features_NF if mask_BT is None else features_NF[mask_BT.flatten() != 0]
