"""How large the residual stream is before each block."""

# B batch, T tokens

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from normfree.measures.measure import Measure, Total


class Residual(Measure):
    """Root mean square of the residual stream before each block, over features and tokens that are no padding.

    Raises ValueError for a model without a list of as many blocks as it has layers.
    """

    gives = ("residual_rms",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._blocks = _blocks_of(model)
        self._mask_BT: Tensor | None = None
        self._squares = torch.zeros(len(self._blocks), dtype=torch.float64)
        self._numbers = torch.zeros(len(self._blocks), dtype=torch.int64)

    def __enter__(self) -> Self:
        self._hooks = [
            block.register_forward_pre_hook(self._reader(layer), with_kwargs=True)
            for layer, block in enumerate(self._blocks)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def expect(self, labels_BT: Tensor | None, mask_BT: Tensor | None) -> None:
        self._mask_BT = mask_BT

    def _reader(self, layer: int) -> Any:
        def read(_block: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            stream: Tensor = positional[0] if positional else named["hidden_states"]
            if self._mask_BT is not None:
                stream = stream[self._mask_BT != 0]
            self._squares[layer] += stream.detach().float().square().sum(dtype=torch.float64).cpu()
            self._numbers[layer] += stream.numel()

        return read

    def totals(self) -> dict[str, Total]:
        return {"residual_rms": (self._squares, self._numbers)}


def _blocks_of(model: nn.Module) -> nn.ModuleList:
    """The list of blocks: the first with as many modules as the config has layers."""
    config: Any = getattr(model, "config", None)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == layers:
            return part
    raise ValueError(f"no list of {layers} blocks found in {type(model).__name__}")
