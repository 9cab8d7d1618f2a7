"""What enters every block."""

# B batch, T tokens, E hidden size

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from normfree.measures.measure import Measure
from normfree.measures.places import Label, blocks_of, stream_of


class StreamMeasure(Measure):
    """Base of measures of the residual stream before each block, a layer a block of `blocks_of(model)`.

    A subclass overrides `read_stream`. Raises ValueError for a model without a list of blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.blocks = blocks_of(model)

    def attach(self) -> ExitStack:
        hooks = ExitStack()
        for layer, (label, block) in enumerate(self.blocks.items()):
            hook = partial(self._read, layer, label)
            hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return hooks

    def _read(self, layer: int, label: Label, _block: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        self.read_stream(layer, stream_of(inputs, named).detach().flatten(1, -2), self.mask_of(label))

    def read_stream(self, layer: int, stream_BTE: Tensor, mask_BT: Tensor | None) -> None:
        """Read the stream before a block; `layer` counts `blocks`, and the mask is 0 at padding."""

    @property
    def layers(self) -> list[Label]:
        return list(self.blocks)
