"""Learnable slopes of leaky ReLUs."""

from __future__ import annotations

import torch

from normfree.measures.measure import Measure, Total


class Slopes(Measure):
    """The current learnable slopes; nothing for a model without them."""

    gives = ("negative_slope",)

    # Models of other libraries have no `slope_layers` and `negative_slopes`, and measures may not import our model.

    @property
    def layers(self) -> list[int] | None:
        return getattr(self.model, "slope_layers", list)() or None

    def totals(self) -> dict[str, Total]:
        slopes = getattr(self.model, "negative_slopes", dict)()
        if not slopes:
            return {}
        slope_S = torch.stack(list(slopes.values())).detach().double()
        return {"negative_slope": (slope_S, torch.ones_like(slope_S))}  # every process has the same slopes
