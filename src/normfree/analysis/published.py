"""The paper's numbers for comparison: one seed each, without error bars.

Jha and Reagen, "ReLU's Revival: On the Entropic Overload in Normalization-Free Large Language Models"
(arXiv 2410.09637). SM+LN comes from the same authors' Entropy-Guided Attention (arXiv 2501.03489).
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfree.spec.families import family_of

BASELINE = "SM+LN+G"
ORDER = (BASELINE, "SM+LN+R", "SM+G", "SM+R", "SM+LN", "SM")  # the paper's variants, in the order of its tables
GELU_OF = {"SM+R": "SM+G", "SM+LN+R": "SM+LN+G"}  # differ only in their activation
SETTING = {"SM+R": "Without LayerNorm", "SM+LN+R": "With LayerNorm"}
COMPARISONS = (*GELU_OF.items(), ("SM+G", BASELINE), ("SM+R", BASELINE))  # pairs of variants that the paper compares

SOURCE = "Jha and Reagen, arXiv 2410.09637 (SM+LN: arXiv 2501.03489); one seed each"
HEATMAP_CONTEXT = 128  # block length of the published heatmaps; their causal ceiling is ln(128!)/128 = 3.878 nats

PERPLEXITY: dict[str, dict[str, float]] = {
    "GPT-2 125M, T=128": {"SM+LN+G": 2.688, "SM+LN+R": 2.757, "SM+G": 3.197, "SM+R": 2.936, "SM+LN": 3.38},
    "Pythia-70M, T=128": {"SM+LN+G": 3.512, "SM+LN+R": 3.590, "SM+G": 4.086, "SM+R": 3.736, "SM+LN": 4.445},
    "Pythia-70M, T=256": {"SM+LN+G": 3.054, "SM+LN+R": 3.107, "SM+G": 3.570, "SM+R": 3.273, "SM+LN": 3.836},
}

RANGE_PERCENT: dict[str, tuple[int, int, int, int]] = {
    "SM+LN+G": (4, 14, 74, 8),
    "SM+LN+R": (6, 16, 74, 3),
    "SM+G": (1, 18, 23, 58),
    "SM+R": (3, 20, 53, 24),
}
"""Heads per quarter of the observed maximum, GPT-2 125M, percent."""


def is_gpt2(spec: Mapping[str, Any]) -> bool:
    """True if a run is compared with GPT-2 125M, the only model with published heatmaps and ranges."""
    return counterpart(spec).startswith("GPT-2")


def counterpart(spec: Mapping[str, Any]) -> str:
    """The published model closest to a decoder in shape: Pythia for rotary positions, else GPT-2; empty for others."""
    if not family_of(spec).causal:
        return ""
    if spec["model"].get("position") != "rotary":
        return "GPT-2 125M, T=128"
    return "Pythia-70M, T=256" if spec["data"]["context"] >= 256 else "Pythia-70M, T=128"


def relative_difference(model: str, label: str, other: str) -> float | None:
    """Published perplexity of `label` over that of `other`, minus 1; None if one is unpublished."""
    values = PERPLEXITY.get(model, {})
    if label not in values or other not in values:
        return None
    return values[label] / values[other] - 1


@cache
def heatmaps() -> dict[str, NDArray[np.float64]]:
    """Published head entropies of GPT-2 125M in nats, `{label: [12 layers, 12 heads]}`, two decimals."""
    text = Path(__file__).with_name("published_heatmaps.json").read_text(encoding="utf-8")
    return {label: np.array(value) for label, value in json.loads(text)["entropy_nats"].items()}
