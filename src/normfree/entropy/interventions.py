"""intervene(): replace what chosen attention heads write, in any model that routes its attention."""

# B batch, T query, S key, H query heads, G key heads, D value width; h chosen heads; R rows and C columns of one block

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normfree.entropy.layers import Layer, attention_layers, labels
from normfree.entropy.routing import AttentionCall
from normfree.entropy.support import UnsupportedModel
from normfree.entropy.tap import EDITS, AttentionTap
from normfree.entropy.visibility import ROWS, Visibility

How = Literal["average", "zero"] | float


@contextmanager
def intervene(model: nn.Module, heads: Sequence[tuple[Layer, int]], how: How = "average") -> Iterator[None]:
    """Change what heads hand to the output projection, in each forward pass in the `with`.

    heads: (layer, head) each, the layer as results call it: 3, or "cross 3" in a model with several groups of heads.
    how: 'average' puts the mean of the values in place of the attention, over all keys that the row may see (causality,
        windows and padding count; a sink gets nothing, a position bias plays no part, nothing is dropped out);
        'zero' silences the heads; a number multiplies what they write.

    Gradients flow; with gradient checkpointing call backward inside the `with`. A compiled model has a break in its
    graph at each changed layer, so torch refuses one with fullgraph=True. Interventions may be nested (the inner one
    changes what the outer one left) and open beside a probe, which shows of a changed head the attention that it
    computes and that is discarded. On leaving, also after an exception, everything is as before.

    Raises ValueError for layers and heads that are not there and other values of `how`; UnsupportedModel (a ValueError)
    for a model that does not route its attention, and on leaving if passes did not use a changed layer.
    """
    if how not in ("average", "zero") and not (isinstance(how, (int, float)) and math.isfinite(how)):
        raise ValueError(f"how={how!r}; allowed: 'average', 'zero' or a finite number that scales the heads")
    if not hasattr(model, "config") or not attention_layers(model):
        raise UnsupportedModel(f"{type(model).__name__} does not route its attention, so no head is changed")
    tap = AttentionTap(model, lambda layer, call: None)
    edits = [(module, _Edit(layer, chosen, how)) for module, layer, chosen in _chosen_modules(model, heads)]
    passes: set[int] = set()
    with tap, model.register_forward_hook(lambda ran, *_: passes.add(id(ran))):
        for module, edit in edits:
            setattr(module, EDITS, (*getattr(module, EDITS, ()), edit))
        try:
            yield
            if id(model) in passes and (unused := [edit.layer for _, edit in edits if not edit.is_used]):
                raise UnsupportedModel(
                    f"layer {unused[0]} was not changed: its attention does not go through transformers' registry"
                )
        finally:
            for module, edit in edits:
                others = tuple(other for other in getattr(module, EDITS) if other is not edit)
                setattr(module, EDITS, others) if others else delattr(module, EDITS)


def _chosen_modules(
    model: nn.Module, heads: Sequence[tuple[Layer, int]]
) -> Iterator[tuple[nn.Module, Layer, list[int]]]:
    """Each chosen layer's module, label and heads in ascending order."""
    heads_of_layer: dict[Layer, set[int]] = defaultdict(set)
    try:
        for layer, head in heads:
            heads_of_layer[layer].add(head)
    except (TypeError, ValueError):
        heads_of_layer.clear()
    if not heads_of_layer:
        raise ValueError(f"heads={heads!r}; give one or more pairs (layer, head), e.g. [(0, 3), (1, 2)]")
    layers = attention_layers(model)
    modules = dict(zip(labels(layers.values()), sorted(layers, key=layers.__getitem__), strict=True))
    own = {layer.group for layer in layers.values() if not layer.is_cross}
    if len(own) == 1:  # a decoder alone: its results call the layers 0, 1, 2
        modules |= {layer.number: module for module, layer in layers.items() if not layer.is_cross}
    for layer, chosen in heads_of_layer.items():
        if layer not in modules:
            raise ValueError(f"layer {layer} has no attention here; allowed: {', '.join(map(str, modules))}")
        yield modules[layer], layer, sorted(chosen)


@dataclass(eq=False)
class _Edit:
    """What happens to the heads of one layer."""

    layer: Layer
    heads: list[int]
    how: How
    is_used: bool = False

    @torch.compiler.disable(reason="normfree.intervene works between graphs: compile without fullgraph=True")
    def __call__(self, call: AttentionCall, value_BGSD: Tensor, result: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """The result of an attention function, (B, T, H, D) and weights, with other outputs of the chosen heads."""
        output_BTHD, weights = result
        self.is_used = True
        count = call.q.shape[1]
        if wrong := [head for head in self.heads if not 0 <= head < count]:
            raise ValueError(f"layer {self.layer} has no head {wrong[0]}; allowed: 0 to {count - 1}")
        heads_h = torch.tensor(self.heads, device=output_BTHD.device)
        written_BThD = output_BTHD.index_select(2, heads_h)
        if self.how == "average":
            value_BhSD = value_BGSD[:, heads_h // (count // value_BGSD.shape[1]), : call.k.shape[2]]
            mean_BThD = _mean_of_visible(value_BhSD, call.request().visibility, heads_h).transpose(1, 2)
            # A model of ours with a sink has a first row and a last column more, which it removes.
            rows, columns = (written_BThD.shape[axis] - mean_BThD.shape[axis] for axis in (1, 3))
            written_BThD = nn.functional.pad(mean_BThD, (0, columns, 0, 0, rows, 0)).to(output_BTHD.dtype)
        elif self.how == "zero":
            written_BThD = torch.zeros_like(written_BThD)
        else:
            written_BThD = written_BThD * self.how
        return output_BTHD.index_copy(2, heads_h, written_BThD), weights


def _mean_of_visible(value_BhSD: Tensor, visibility: Visibility, heads_h: Tensor) -> Tensor:
    """(B, h, T, D): for every row the mean value of the keys that it may see, in float32 at least; 0 if none."""
    value_BhSD = value_BhSD.to(torch.promote_types(value_BhSD.dtype, torch.float32))
    rows = []
    with torch.autocast(value_BhSD.device.type, enabled=False):
        for block in visibility.blocks(ROWS):
            visible_BhRC = block.visible if block.visible.shape[1] == 1 else block.visible[:, heads_h]
            seen_BhRC = visible_BhRC.to(value_BhSD.dtype)
            total_BhRD = seen_BhRC @ value_BhSD[:, :, block.first : block.last]
            rows.append(total_BhRD / seen_BhRC.sum(-1, keepdim=True).clamp(min=1))
    return torch.cat(rows, dim=2)
