"""Train transformers without LayerNorm and measure what their attention heads do.

Public names are imported on first use, so that `import normfree`, reading runs and making reports do not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normfree.entropy import EntropyProbe, HeadEntropy, attention_entropy
    from normfree.measures.measurement import MeasureCallback, measure
    from normfree.measures.text import perplexity
    from normfree.model import NormFreeConfig, NormFreeForCausalLM
    from normfree.report import build_report
    from normfree.report.plots.heatmaps import heatmap
    from normfree.store.runs import load_runs
    from normfree.training import train

__version__ = "0.1.0"

_PUBLIC = {
    "EntropyProbe": "normfree.entropy",
    "HeadEntropy": "normfree.entropy",
    "MeasureCallback": "normfree.measures.measurement",
    "NormFreeConfig": "normfree.model",
    "NormFreeForCausalLM": "normfree.model",
    "attention_entropy": "normfree.entropy",
    "build_report": "normfree.report",
    "heatmap": "normfree.report.plots.heatmaps",
    "load_runs": "normfree.store.runs",
    "measure": "normfree.measures.measurement",
    "perplexity": "normfree.measures.text",
    "train": "normfree.training",
}

__all__ = [
    "EntropyProbe",
    "HeadEntropy",
    "MeasureCallback",
    "NormFreeConfig",
    "NormFreeForCausalLM",
    "__version__",
    "attention_entropy",
    "build_report",
    "heatmap",
    "load_runs",
    "measure",
    "perplexity",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'normfree' has no attribute {name!r}; it has {', '.join(sorted(_PUBLIC))}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
