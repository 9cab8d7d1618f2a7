"""Train transformers without LayerNorm and measure what their attention heads do; docs/python.md shows how.

Public names are imported on first use, so that `import normfree`, reading runs and making reports do not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normfree.entropy import EntropyProbe, HeadEntropy, attention_entropy, intervene
    from normfree.measures.measurement import MeasureCallback, Measurement, measure
    from normfree.measures.text_perplexity import perplexity
    from normfree.model import NormFreeConfig, NormFreeForCausalLM
    from normfree.pretrained.load import held_out_blocks, load_pretrained
    from normfree.report import build_report
    from normfree.report.plots.heatmaps import heatmap
    from normfree.report.views import compare, plot_curves, plot_heads
    from normfree.spec.compose import compose_run
    from normfree.store.runs import Run, find_runs, load_runs, read_run
    from normfree.training import train

__version__ = "0.1.0"

_NAMES = {
    "normfree.entropy": ("EntropyProbe", "HeadEntropy", "attention_entropy", "intervene"),
    "normfree.measures.measurement": ("MeasureCallback", "Measurement", "measure"),
    "normfree.measures.text_perplexity": ("perplexity",),
    "normfree.model": ("NormFreeConfig", "NormFreeForCausalLM"),
    "normfree.pretrained.load": ("held_out_blocks", "load_pretrained"),
    "normfree.report": ("build_report",),
    "normfree.report.plots.heatmaps": ("heatmap",),
    "normfree.report.views": ("compare", "plot_curves", "plot_heads"),
    "normfree.spec.compose": ("compose_run",),
    "normfree.store.runs": ("Run", "find_runs", "load_runs", "read_run"),
    "normfree.training": ("train",),
}
_PUBLIC = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "EntropyProbe", "HeadEntropy", "MeasureCallback", "Measurement", "NormFreeConfig", "NormFreeForCausalLM", "Run",
    "__version__", "attention_entropy", "build_report", "compare", "compose_run", "find_runs", "heatmap",
    "held_out_blocks", "intervene", "load_pretrained", "load_runs", "measure", "perplexity", "plot_curves",
    "plot_heads", "read_run", "train",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'normfree' has no attribute {name!r}; it has {', '.join(sorted(_PUBLIC))}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
