"""What to do when a loss or a gradient is not finite, and where it began."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from normfree.store.runs import divergence_text

KINDS = ("weight", "activation", "loss", "gradient")
"""In the order of a step."""


@dataclass(frozen=True)
class Divergence:
    """The first non-finite value of a step. A run that stops at one is a result, recorded as diverged."""

    step: int
    """The optimiser step that was not taken, counted from 1."""
    layer: int | None
    """Block of the first non-finite value, or None outside the blocks (embedding, final norm, head)."""
    module: str
    """Name of that module or parameter."""
    kind: str
    """The first of `KINDS` that is not finite."""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        return divergence_text(self.to_dict())


class NonFiniteError(ArithmeticError):
    """Stops training before the optimiser sees a non-finite gradient."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(str(divergence))
        self.divergence = divergence


def total_gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm over all gradients; not finite as soon as one element is not (or the square overflows)."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def locate(model: nn.Module, batches: list[dict[str, Tensor]], *, step: int) -> Divergence:
    """Find where a step went non-finite: in the weights, else in a forward pass, else in the gradients.

    Within the weights and the forward pass the first in model order counts; among gradients the last, since
    backward runs from the end. Runs the batches once more, without gradients; leaves gradients as they are.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return _divergence(step, name, "weight")
    for batch in batches:
        with _first_nonfinite_output(model) as found, torch.no_grad():
            loss = model(**batch).loss
        if found:
            return _divergence(step, found[0], "activation")
        if not torch.isfinite(loss):
            return _divergence(step, "loss", "loss")
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    broken = [name for name, gradient in named if not torch.isfinite(gradient).all()]
    return _divergence(step, broken[-1] if broken else "gradient norm", "gradient")


def earliest(found: Sequence[Divergence]) -> Divergence:
    """Of what several processes found in one step, what came first; gradients are common to all, the rest is not."""
    return min(found, key=lambda one: KINDS.index(one.kind))


@contextmanager
def _first_nonfinite_output(model: nn.Module) -> Iterator[list[str]]:
    found: list[str] = []

    def hook_for(name: str):
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if not found and not all(torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (dict, list, tuple)):
        for item in output.values() if isinstance(output, dict) else output:
            yield from _tensors(item)


def _divergence(step: int, name: str, kind: str) -> Divergence:
    layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return Divergence(step=step, layer=layer, module=name, kind=kind)
