"""The size of the residual stream before each block."""

# B batch, T tokens

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normfree.measures.measure import Measure, Total


class Residual(Measure):
    """Root mean square of the residual stream before each block, over features and all tokens but padding.

    Raises ValueError for a model without a list of as many blocks as it has layers.
    """

    gives = ("residual_rms",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._blocks = _blocks_of(model)
        self._squares = torch.zeros(len(self._blocks), dtype=torch.float64)
        self._numbers = torch.zeros(len(self._blocks), dtype=torch.int64)

    def attach(self) -> ExitStack:
        hooks = ExitStack()
        for layer, block in enumerate(self._blocks):
            hooks.callback(block.register_forward_pre_hook(partial(self._read, layer), with_kwargs=True).remove)
        return hooks

    def _read(self, layer: int, _block: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        stream: Tensor = positional[0] if positional else named["hidden_states"]
        if self.mask_BT is not None:
            stream = stream[self.mask_BT != 0]
        self._squares[layer] += stream.detach().float().square().sum(dtype=torch.float64).cpu()
        self._numbers[layer] += stream.numel()

    def totals(self) -> dict[str, Total]:
        return {"residual_rms": (self._squares, self._numbers)}


def _blocks_of(model: nn.Module) -> nn.ModuleList:
    """The first list of as many modules as the config has layers."""
    config: Any = getattr(model, "config", None)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == layers:
            return part
    raise ValueError(f"no list of {layers} blocks found in {type(model).__name__}")
