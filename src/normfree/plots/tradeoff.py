"""Perplexity against what private inference sends."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from normfree.plots.style import INK, MUTED


def trade_off(
    labels: Sequence[str],
    perplexity: Sequence[float],
    gigabytes: Sequence[float],
    on_front: Sequence[bool],
    *,
    ax: Axes,
) -> Axes:
    """One point a variant, joined along the Pareto front; variants without a finite perplexity are named only."""
    finite = [i for i, value in enumerate(perplexity) if math.isfinite(value)]
    front = sorted((gigabytes[i], perplexity[i]) for i in finite if on_front[i])
    ax.plot([x for x, _ in front], [y for _, y in front], color="#00896a", linewidth=1, zorder=1)
    for i in finite:
        colour = "#00896a" if on_front[i] else MUTED
        ax.plot(gigabytes[i], perplexity[i], marker="o" if on_front[i] else "x", color=colour, linestyle="none")
        ax.annotate(
            labels[i], (gigabytes[i], perplexity[i]), xytext=(5, 4), textcoords="offset points", fontsize=7.5, color=INK
        )
    missing = [labels[i] for i in range(len(labels)) if i not in finite]
    if missing:
        ax.text(0.98, 0.97, f"NaN: {', '.join(missing)}", transform=ax.transAxes, ha="right", va="top", color="#b23a48")
    ax.margins(x=0.2, y=0.15)
    ax.set(xlabel="sent in private inference (GB)", ylabel="validation perplexity")
    return ax
