"""Which attention modules of a model are measured, and what their layers are called.

A stack is a list of blocks. A model with several has groups of heads, named by the part of the module path that tells
the stacks apart: encoder and decoder, vision and text. Heads that attend over another sequence are the group cross.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from normfree.entropy.routing import registry_of
from normfree.entropy.support import CROSS_ATTENTION_NAMES, EAGER_ONLY

Layer = int | str
"""What results call a layer: its number, or group and number (`cross 0`) where several groups were measured."""

_GROUPS = {"vision": "vision", "visual": "vision", "image": "vision", "audio": "audio", "speech": "audio"}
_GROUPS |= {"text": "text", "language": "text", "encoder": "encoder", "decoder": "decoder"}
"""Words in module names and the group that each means, in the order of the groups."""
_CROSS = "cross"


class HeadLayer(NamedTuple):
    """The heads of one attention module; sorts by group, then number."""

    rank: int  # of the group among those of a model
    group: str  # empty for the only stack of a model
    number: int
    stack: str = ""  # path of the list of blocks, which cross-attention shares with the self-attention before it

    @property
    def is_cross(self) -> bool:
        """True if the keys are of another sequence than the queries."""
        return self.group.endswith(_CROSS)

    def __str__(self) -> str:
        return f"{self.group} {self.number}".strip()

    @classmethod
    def of(cls, group: str, number: int, stack: str = "") -> HeadLayer:
        """A layer of a group, with the group's rank."""
        order = [*dict.fromkeys(_GROUPS.values()), group]
        return cls(len(order) if group.endswith(_CROSS) else order.index(group), group, number, stack)


def labels(layers: Iterable[HeadLayer]) -> list[Layer]:
    """Labels of measured layers in their order: numbers if all are of one group."""
    ordered = sorted(layers)
    is_one_group = len({layer.group for layer in ordered}) == 1
    return [layer.number if is_one_group else str(layer) for layer in ordered]


def attention_layers(model: nn.Module) -> dict[Any, HeadLayer]:
    """The layer of every routed module; empty for families that route only a part of their heads.

    A layer's number is the module's `layer_idx`, else its block's place in the list of blocks. Where two modules of a
    group have one number, the group counts its modules in the order of the model.
    """
    if getattr(getattr(model, "config", None), "model_type", None) in EAGER_ONLY:
        return {}
    routed = {
        module: _place(model, name.split("."), module)
        for name, module in model.named_modules()
        if not isinstance(module, PreTrainedModel) and registry_of(type(module)) is not None
    }
    own = stack_names(stack for stack, _, is_cross in routed.values() if not is_cross)
    across = stack_names(stack for stack, _, is_cross in routed.values() if is_cross)
    if across and len(own) == 1:
        own = dict.fromkeys(own, "decoder")
    groups: dict[str, dict[nn.Module, HeadLayer]] = {}
    for module, (stack, number, is_cross) in routed.items():
        group = f"{across[stack]} {_CROSS}".strip() if is_cross else own[stack]
        groups.setdefault(group, {})[module] = HeadLayer.of(group, number, ".".join(stack))
    for layers in groups.values():
        if len({layer.number for layer in layers.values()}) < len(layers):
            for number, (module, layer) in enumerate(layers.items()):
                layers[module] = layer._replace(number=number)
    return {module: layer for layers in groups.values() for module, layer in layers.items()}


def _place(model: nn.Module, path: list[str], module: Any) -> tuple[tuple[str, ...], int, bool]:
    """The path of the outermost list of blocks, the layer's number, and whether the module is cross-attention."""
    parts = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    depth = next((depth for depth, part in enumerate(parts) if isinstance(part, nn.ModuleList)), None)
    place = 0 if depth is None else int(path[depth])
    layer = getattr(module, "layer_idx", None)
    number = layer if isinstance(layer, int) and layer >= 0 else place
    is_cross = getattr(module, "is_cross_attention", False) or not CROSS_ATTENTION_NAMES.isdisjoint(path)
    return tuple(path[:-1] if depth is None else path[:depth]), number, is_cross


def stack_names(stacks: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A group name for each stack: the last part of its path that tells it from another; empty for a single one.

    Where two stacks would have one name, they have that part unchanged, or the whole path.
    """
    stacks = list(dict.fromkeys(stacks))
    if len(stacks) == 1:
        return {stacks[0]: ""}
    parts = [stack[max(_shared(stack, other) for other in stacks if other != stack)] for stack in stacks]
    known = [next((group for word, group in _GROUPS.items() if word in part.lower()), part) for part in parts]
    return {
        stack: name if known.count(name) == 1 else part if parts.count(part) == 1 else ".".join(stack)
        for stack, part, name in zip(stacks, parts, known, strict=True)
    }


def _shared(path: tuple[str, ...], other: tuple[str, ...]) -> int:
    """How many parts two paths begin with alike, at most all but the last of `path`."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(path[:-1], other, strict=False))
    return sum(1 for _ in alike)
