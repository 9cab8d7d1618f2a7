"""Learnable slopes of leaky ReLUs."""

from __future__ import annotations

import torch

from normfree.measures.measure import Measure, Total


class Slopes(Measure):
    """The learnable slopes as they stand; nothing for a model without them."""

    gives = ("negative_slope",)

    @property
    def layers(self) -> list[int] | None:
        return getattr(self.model, "slope_layers", list)() or None

    def totals(self) -> dict[str, Total]:
        slopes = getattr(self.model, "negative_slopes", dict)()
        if not slopes:
            return {}
        slope_S = torch.stack(list(slopes.values())).detach().double()
        return {"negative_slope": (slope_S, torch.ones_like(slope_S))}  # equal in all processes, so their mean
