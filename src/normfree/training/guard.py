"""Find where a step became non-finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normfree.store.runs import divergence_text
from normfree.training.sharding import free_gathered_weights, own_part

KINDS = ("weight", "activation", "loss", "gradient")
"""In the order in which a step computes them."""


@dataclass(frozen=True)
class Divergence:
    """The first non-finite value of a step. A run that stops there is recorded as diverged."""

    step: int
    """The optimiser step that was not taken, counted from 1."""
    layer: int | None
    """The block, or None outside the blocks (embedding, final norm, head)."""
    module: str
    """The module or parameter."""
    kind: str
    """One of `KINDS`."""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        return divergence_text(self.to_dict())


class NonFiniteError(ArithmeticError):
    """Raised before the optimiser sees a non-finite gradient."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(str(divergence))
        self.divergence = divergence


def locate(model: nn.Module, batches: list[dict[str, Tensor]], *, step: int) -> Divergence:
    """Find where a step became non-finite: in a weight, else in a forward pass, else in a gradient.

    Of weights and activations the first in model order counts, of gradients the last, because backward starts at the
    end. Repeats the forward passes without gradients; existing gradients are not changed. A process with a part of the
    model looks at its own part, and makes every pass, because the others wait for it.
    """
    named = list(model.named_parameters())
    weights = [name for name, parameter in named if not torch.isfinite(own_part(parameter)).all()]
    gradients = [(name, own_part(p.grad)) for name, p in named if p.grad is not None]
    broken = [name for name, gradient in gradients if not torch.isfinite(gradient).all()]
    divergences = [_divergence(step, name, "weight") for name in weights[:1]]
    for batch in batches:
        with _nonfinite_modules(model) as modules, torch.no_grad():
            loss = model(**batch).loss
        if modules:
            divergences.append(_divergence(step, modules[0], "activation"))
        elif not torch.isfinite(loss):
            divergences.append(_divergence(step, "loss", "loss"))
    free_gathered_weights(model)
    return [*divergences, _divergence(step, broken[-1] if broken else "gradient norm", "gradient")][0]


def earliest(divergences: Sequence[Divergence]) -> Divergence:
    """Choose the divergence of the earliest kind. Processes share gradients, but not batches."""
    return min(divergences, key=lambda divergence: KINDS.index(divergence.kind))


@contextmanager
def _nonfinite_modules(model: nn.Module) -> Iterator[list[str]]:
    """Collect the name of the first module of a forward pass with a non-finite output."""
    names: list[str] = []

    def check(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        tensors = [tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
        if not names and not all(torch.isfinite(tensor).all() for tensor in tensors):
            names.append(name)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(partial(check, name)).remove)
        yield names


def _divergence(step: int, name: str, kind: str) -> Divergence:
    layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return Divergence(step=step, layer=layer, module=name, kind=kind)
