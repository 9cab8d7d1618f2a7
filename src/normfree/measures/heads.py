"""Entropy, first-token mass and distance of every attention head."""

from __future__ import annotations

import logging

import torch

from normfree.entropy import EntropyProbe
from normfree.entropy.layers import Layer
from normfree.entropy.probe import ProbeMethod
from normfree.entropy.routing import compresses_keys
from normfree.measures.measure import Measure, Total

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

    def totals(self) -> dict[str, Total]:
        entropy = self.probe.statistics()
        totals: dict[str, Total] = {
            "entropy_nats": (entropy.sum_nats, entropy.rows),
            "ceiling_nats": (entropy.sum_ceiling_nats, entropy.ceiling_rows),
            "rows": entropy.rows,
            "nonfinite_rows": entropy.nonfinite_rows,
        }
        if entropy.sum_first_mass is not None and entropy.sum_distance is not None:
            totals["first_token_mass"] = (entropy.sum_first_mass, entropy.rows)
            totals["distance_tokens"] = (entropy.sum_distance, entropy.rows)
        return totals

    @property
    def layers(self) -> list[Layer]:
        return self.probe.statistics().layers
