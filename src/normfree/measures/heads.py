"""Entropy, first-token mass, distance and sink rates of every attention head."""

# B batch, H query heads, T query

import logging

import torch
from torch import Tensor

from normfree.entropy import EntropyProbe
from normfree.entropy.layers import HeadLayer, Layer
from normfree.entropy.probe import ProbeMethod, measured_rows
from normfree.entropy.routing import AttentionCall, compresses_keys
from normfree.measures.measure import Measure
from normfree.measures.reading import CallMeasure

SINK_MASS = 0.3  # mass that makes a sink (Gu et al., arXiv 2410.10781)

logger = logging.getLogger("normfree")


class Heads(Measure):
    """Exact entropy of every head without the T x T matrix, and two patterns that the same call gives.

    First-token mass and distance are left out with method='eager' and in models that compress their keys, where a key
    has no position. Raises UnsupportedModel (a ValueError) for a model without softmax attention.
    """

    gives = ("entropy_nats", "ceiling_nats", "rows", "nonfinite_rows", "first_token_mass", "distance_tokens")

    def __init__(self, model: torch.nn.Module, method: ProbeMethod = "auto") -> None:
        super().__init__(model)
        patterns = method == "auto"
        if patterns and any(compresses_keys(module) for module in model.modules()):
            logger.warning("compressed keys have no position: mean distance and first-token mass are left out")
            patterns = False
        self.probe = EntropyProbe(model, method, patterns=patterns)

    def attach(self) -> list[EntropyProbe]:
        return [self.probe]

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        entropy = self.probe.statistics()
        entropy.all_reduce(device)
        values = {"entropy_nats": entropy.mean_nats(), "ceiling_nats": entropy.ceiling_nats()}
        values |= {"rows": entropy.rows, "nonfinite_rows": entropy.nonfinite_rows}
        if entropy.sum_distance is not None:
            values |= {"first_token_mass": entropy.mean_first_mass(), "distance_tokens": entropy.mean_distance()}
        return values

    @property
    def layers(self) -> list[Layer]:
        return self.probe.statistics().layers


class Sinks(CallMeasure):
    """Two sink rates of every head from the mass that each row puts on the first real token.

    `sink_text_rate` is the metric of Gu et al. (arXiv 2410.10781): the share of texts whose mean over rows is above
    0.3. `sink_row_rate` is what other code of that name computes: the share of single rows above 0.3. A head with mass
    0.5 on half of its rows has rates 0 and 0.5. `first_row` leaves out the first so many real rows of each text; 0 is
    the k = 1 of Gu et al., and row 0 always has mass 1. Raises ValueError for keys whose first token is unknown.
    """

    gives = ("sink_text_rate", "sink_row_rate", "sink_rows")

    def __init__(self, model: torch.nn.Module, first_row: int = 0) -> None:
        super().__init__(model)
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
    return torch.where(mass.isnan(), mass, (mass > SINK_MASS).double())
