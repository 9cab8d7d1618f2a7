"""Measures of a model in training: gradient norms of its blocks, and learnable slopes of leaky ReLUs."""

import torch
from torch import Tensor, nn

from normfree.measures.measure import Measure, mean_over_processes
from normfree.measures.places import blocks_of


class Gradients(Measure):
    """L2 norm of the gradient of each block's parameters in the last optimiser step, averaged over processes.

    The trainer leaves them in `model.block_gradient_norms`: nothing before the first step, NaN for a skipped one.
    """

    gives = ("block_gradient_norm", "clipped_block_gradient_norm")
    needs_training = True

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        norms: tuple[Tensor, ...] = getattr(self.model, "block_gradient_norms", ())
        means = (mean_over_processes(norm_L, torch.ones_like(norm_L), device) for norm_L in norms)
        return dict(zip(self.gives, means, strict=False))


def block_gradient_norms(model: nn.Module) -> Tensor:
    """(L,) float64: the L2 norm of the current gradient of each block; NaN for a block without any."""
    norms = []
    for block in blocks_of(model).values():
        gradients = [parameter.grad for parameter in block.parameters() if parameter.grad is not None]
        missing = next(block.parameters()).new_tensor(torch.nan)
        norms.append(nn.utils.get_total_norm(gradients) if gradients else missing)
    return torch.stack(norms).double().cpu()


class Slopes(Measure):
    """The current learnable slopes; nothing for a model without them, such as one of another library."""

    gives = ("negative_slope",)

    @property
    def layers(self) -> list[int] | None:
        return getattr(self.model, "slope_layers", list)() or None

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        slopes = getattr(self.model, "negative_slopes", dict)()  # every process has the same
        return {"negative_slope": torch.stack(list(slopes.values())).detach().double().cpu()} if slopes else {}
