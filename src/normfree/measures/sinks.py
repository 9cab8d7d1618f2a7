"""How often the first token is an attention sink, by both definitions in use."""

# B batch, H query heads, T query

from __future__ import annotations

import torch
from torch import Tensor

from normfree.entropy.layers import HeadLayer
from normfree.entropy.probe import measured_rows
from normfree.entropy.routing import AttentionCall
from normfree.measures.reading import CallMeasure

THRESHOLD = 0.3  # mass that makes a sink (Gu et al., arXiv 2410.10781)


class Sinks(CallMeasure):
    """Two sink rates of every head from the mass that each row puts on the first real token.

    `sink_text_rate` is the metric of Gu et al. (arXiv 2410.10781): the share of texts whose mean over rows is above
    0.3. `sink_row_rate` is what other code of that name computes: the share of single rows above 0.3. A head with mass
    0.5 on half of its rows has rates 0 and 0.5. `first_row` leaves out the first so many real rows of each text; 0 is
    the k = 1 of Gu et al., and row 0 always has mass 1. Rates depend on the rows of a text, `sink_rows`.

    `heads` shares the measured rows. Raises UnsupportedModel (a ValueError) for a model that does not route its
    attention through transformers' registry, ValueError for keys whose first token is unknown.
    """

    gives = ("sink_text_rate", "sink_row_rate", "sink_rows")

    def __init__(self, model: torch.nn.Module, first_row: int = 0) -> None:
        super().__init__(model)
        if first_row < 0:
            raise ValueError(f"first_row={first_row} must be at least 0")
        self.first_row = first_row

    def read_call(self, layer: HeadLayer, call: AttentionCall) -> None:
        rows = measured_rows(layer, call, patterns=True)
        mass_BHT, real_BHT = rows.first_mass, rows.visible > 0
        assert mass_BHT is not None
        real_BHT = real_BHT & (real_BHT.cumsum(-1) > self.first_row)
        mass_BHT = torch.where(real_BHT, mass_BHT, 0.0).double()
        rows_BH = real_BHT.sum(-1)
        text_BH = _above(mass_BHT.sum(-1) / rows_BH.clamp(min=1))
        self.add(layer, texts=text_BH.sum(0), counted=(rows_BH > 0).sum(0))
        self.add(layer, above=_above(mass_BHT).sum((0, 2)), rows=rows_BH.sum(0))

    def values(self, texts: Tensor, counted: Tensor, above: Tensor, rows: Tensor) -> dict[str, Tensor]:
        of_text = rows.double().sum() / counted.sum()
        return {"sink_text_rate": texts / counted, "sink_row_rate": above / rows, "sink_rows": of_text}


def _above(mass: Tensor) -> Tensor:
    """1 where the mass is above the threshold, else 0; NaN where it is NaN."""
    return torch.where(mass.isnan(), mass, (mass > THRESHOLD).double())
