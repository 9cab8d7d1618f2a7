"""Where a model's blocks, their attention and their feed-forward parts are; places.yaml has the names of modules."""

# B batch, T tokens, E hidden size, F feed-forward width

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normfree.entropy.layers import Layer as Label
from normfree.entropy.layers import stack_names

NAMES: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True, eq=False)
class Place:
    """A block of a model and its parts."""

    label: Label  # the number of the block; with its stack where a model has several, e.g. `encoder 0`, `vision 0`
    block: nn.Module
    attention: nn.Module | None  # None for both if what they add is the output of no module (e.g. scaled in the sum)
    feed_forward: nn.Module | None
    reads: nn.Module  # linear map; its first `width` outputs enter the nonlinearity, in a gated part the gate's
    writes: nn.Module  # linear map that reads the activated features, in a gated part the product

    @property
    def width(self) -> int:
        """F, the number of activated features."""
        weight: Tensor = self.writes.weight  # pyright: ignore[reportAssignmentType]
        return weight.shape[0] if type(self.writes).__name__ == "Conv1D" else weight.shape[1]

    def read_added(self, part: nn.Module, read: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `read` with what `part`, attention or feed-forward, adds to the stream in each forward pass."""
        joins = any(part is getattr(self.block, name, None) for name in NAMES["joins"])

        def hook(_part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            output = output if isinstance(output, Tensor) else output[0]
            read(output - inputs[0] if joins else output)

        return part.register_forward_hook(hook)


def stream_of(positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The residual stream among the arguments of a block: the first, or hidden_states."""
    return positional[0] if positional else named["hidden_states"]


def blocks_of(model: nn.Module) -> dict[Label, nn.Module]:
    """The blocks of all stacks, by label. Raises ValueError for a model without a list of blocks."""
    stacks: dict[str, nn.ModuleList] = {}
    if reason := NAMES["unreadable"].get(getattr(getattr(model, "config", None), "model_type", None)):
        raise ValueError(f"blocks of {type(model).__name__} cannot be measured: {reason}")
    for path, part in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in stacks)
        if isinstance(part, nn.ModuleList) and len(part) and path.split(".")[-1] in NAMES["block_lists"] and not inside:
            stacks[path] = part
    if not stacks:
        looked_for = ", ".join(NAMES["block_lists"])
        raise ValueError(f"no list of blocks in {type(model).__name__}; looked for lists named {looked_for}")
    called = stack_names(tuple(path.split(".")) for path in stacks)
    return {
        f"{name} {number}" if name else number: block
        for name, stack in zip(called.values(), stacks.values(), strict=True)
        for number, block in enumerate(stack)
    }


def places_of(model: nn.Module) -> list[Place]:
    """Every block with its parts. Raises ValueError for a model without a list of blocks, or for a block without a
    feed-forward part of two linear maps, such as a mixture of experts.
    """
    places = []
    for label, block in blocks_of(model).items():
        kind, linears = type(block).__name__, _first_pair(block, NAMES["linears"])
        if linears is None:
            reason = f"has no feed-forward part; looked for {', '.join('/'.join(pair) for pair in NAMES['linears'])}"
            if any("expert" in path for path, _ in block.named_modules()):
                reason = "is a mixture of experts: no two linear maps read and write the features of every token"
            raise ValueError(f"block {label} of {type(model).__name__} ({kind}) {reason}")
        if kind in NAMES["scaled_features"]:
            raise ValueError(f"{kind} scales its features before the nonlinearity, in no module")
        no_output = kind in NAMES["without_branches"] or any(hasattr(block, name) for name in NAMES["scaled_by"])
        branches = None if no_output else _first_pair(block, NAMES["branches"])
        places.append(Place(label, block, *(branches or (None, None)), *linears))
    return places


def _first_pair(block: nn.Module, pairs: list[list[str]]) -> tuple[nn.Module, nn.Module] | None:
    modules = dict(block.named_modules(remove_duplicate=False))
    for first, second in pairs:
        if first in modules and second in modules:
            return modules[first], modules[second]
    return None
