"""Find where a step became non-finite."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
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
    kind: str
    """One of `KINDS`."""

    def __str__(self) -> str:
        return divergence_text(asdict(self))


class NonFiniteError(ArithmeticError):
    """Raised with a `Divergence` before the optimiser sees a non-finite gradient."""


class UnreadSteps:
    """Steps of which only the device knows yet whether their loss and gradients were finite.

    It tells the optimiser through `found_inf`, which torch's fused optimisers read: from the first non-finite step on
    weights and moments stay what they were before it, so that the step can be repeated when the host learns of it.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer: Any = optimizer
        self._optimizer.found_inf = torch.zeros((), device=device)
        self._finite_steps = torch.zeros((), device=device)
        self._batches: list[list[dict[str, Tensor]]] = []

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, is_finite: Tensor, batches: Sequence[dict[str, Tensor]]) -> None:
        """Add a step that the optimiser is about to take, without waiting for the device."""
        found_inf = torch.maximum(self._optimizer.found_inf, (~is_finite).float())
        self._optimizer.found_inf = found_inf
        self._finite_steps = self._finite_steps + (1 - found_inf)
        self._batches.append([*batches])

    def read(self) -> tuple[int, list[dict[str, Tensor]]] | None:
        """Wait for the device and forget the steps; how many came after the first non-finite one, and its batches."""
        finite, batches = int(self._finite_steps), self._batches
        self._finite_steps, self._batches = torch.zeros_like(self._finite_steps), []
        return (len(batches) - 1 - finite, batches[finite]) if finite < len(batches) else None


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
