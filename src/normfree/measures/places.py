"""Where a model's blocks, their attention and their feed-forward parts are; places.yaml has the names of modules."""

# B batch, T tokens, E hidden size, F feed-forward width

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normfree.entropy.layers import Layer as Label
from normfree.entropy.layers import stack_names


@dataclass(frozen=True, eq=False)
class Place:
    """A block of a model and its parts."""

    label: Label
    """The number of the block; with its stack where a model has several, e.g. `encoder 0`, `vision 0`."""
    block: nn.Module
    attention: nn.Module | None
    """What its call adds to the stream `read_added` gives; None: no module has that (e.g. scaled inside the sum)."""
    feed_forward: nn.Module | None
    reads: nn.Module
    """The linear map whose output, its first `width` features, enters the nonlinearity: in a gated part the gate's."""
    writes: nn.Module
    """The linear map whose input is the activated features: in a gated part the product."""

    @property
    def width(self) -> int:
        """F, the number of activated features."""
        weight: Tensor = self.writes.weight  # pyright: ignore[reportAssignmentType]
        return weight.shape[0] if type(self.writes).__name__ == "Conv1D" else weight.shape[1]

    def read_added(self, part: nn.Module, read: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `read` with what `part`, attention or feed-forward, adds to the stream in each forward pass."""
        joins = any(part is _find(self.block, name) for name in _names()["joins"])

        def hook(_part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            output = output if isinstance(output, Tensor) else output[0]
            read(output - inputs[0] if joins else output)

        return part.register_forward_hook(hook)


def stream_of(positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The residual stream among the arguments of a block. Raises ValueError if it is not the first or hidden_states."""
    stream = positional[0] if positional else named.get("hidden_states")
    if not isinstance(stream, Tensor):
        raise ValueError(f"a block takes no hidden_states among its arguments {', '.join(named)}")
    return stream


def blocks_of(model: nn.Module) -> dict[Label, nn.Module]:
    """The blocks of all stacks, by label. Raises ValueError for a model without a list of blocks."""
    names, stacks = _names(), dict[str, nn.ModuleList]()
    if reason := names["unreadable"].get(getattr(getattr(model, "config", None), "model_type", None)):
        raise ValueError(f"blocks of {type(model).__name__} cannot be measured: {reason}")
    for path, part in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in stacks)
        if isinstance(part, nn.ModuleList) and len(part) and path.split(".")[-1] in names["block_lists"] and not inside:
            stacks[path] = part
    if not stacks:
        looked_for = ", ".join(names["block_lists"])
        raise ValueError(f"no list of blocks in {type(model).__name__}; looked for lists named {looked_for}")
    if len(stacks) == 1:
        return dict(enumerate(next(iter(stacks.values()))))
    called = stack_names(tuple(path.split(".")) for path in stacks)
    return {
        f"{name} {number}": block
        for name, stack in zip(called.values(), stacks.values(), strict=True)
        for number, block in enumerate(stack)
    }


def places_of(model: nn.Module) -> list[Place]:
    """Every block with its parts.

    Raises ValueError, with the model's name and what was looked for, for a model without a list of blocks or a block
    without a feed-forward part of two linear maps, such as a mixture of experts.
    """
    return [_place(model, label, block) for label, block in blocks_of(model).items()]


def _place(model: nn.Module, label: Label, block: nn.Module) -> Place:
    names = _names()
    linears = _first_pair(block, names["linears"])
    if linears is None:
        if any("expert" in path for path, _ in block.named_modules()):
            raise ValueError(
                f"block {label} of {type(model).__name__} is a mixture of experts: no two linear maps read and write "
                "the features of every token"
            )
        looked_for = ", ".join("/".join(pair) for pair in names["linears"])
        raise ValueError(
            f"no feed-forward part in block {label} of {type(model).__name__} ({type(block).__name__}); looked for "
            f"the linear maps {looked_for}"
        )
    if type(block).__name__ in names["scaled_features"]:
        raise ValueError(f"{type(block).__name__} scales its features before the nonlinearity, in no module")
    no_output = type(block).__name__ in names["without_branches"] or any(hasattr(block, a) for a in names["scaled_by"])
    branches = None if no_output else _first_pair(block, names["branches"])
    return Place(label, block, *(branches or (None, None)), *linears)


def _first_pair(block: nn.Module, pairs: list[list[str]]) -> tuple[nn.Module, nn.Module] | None:
    for names in pairs:
        first, second = (_find(block, name) for name in names)
        if first is not None and second is not None:
            return first, second
    return None


def _find(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


@cache
def _names() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
