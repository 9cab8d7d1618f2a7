"""Perplexity against what private inference sends."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from normfree.analysis.seeds import decimals
from normfree.report.plots.perplexity import far_above
from normfree.report.plots.style import GREEN, GRID, INK, MUTED, RED, empty

_ROW = 0.05
"""Height of a label and the space above it, as a share of the axes."""
_LETTERS_BELOW = 70


def trade_off(
    labels: Sequence[str],
    perplexity: Sequence[float],
    gigabytes: Sequence[float],
    on_front: Sequence[bool],
    corpora: Sequence[str],
    *,
    ax: Axes,
) -> Axes:
    """One point a variant, with the Pareto front of each corpus as stairs: what lies above them is beaten in both.

    Variants without a finite perplexity are named only. One far above the others is an arrow at the top, its perplexity
    beside its name, so that the others keep their room.

    Labels stand in a column at the right, in the order of perplexity, each with a line to its point: variants that
    cost the same lie above each other, and their names would too.
    """
    finite = [i for i, value in enumerate(perplexity) if math.isfinite(value)]
    if not finite:
        return empty(ax, "no variant has a finite perplexity")
    for corpus in dict.fromkeys(corpora):
        front = sorted((gigabytes[i], perplexity[i]) for i in finite if on_front[i] and corpora[i] == corpus)
        ax.step([x for x, _ in front], [y for _, y in front], where="post", color=GREEN, linewidth=1, zorder=1)
    limit = far_above([perplexity[i] for i in finite])
    near = [perplexity[i] for i in finite if perplexity[i] <= limit]
    room = 0.1 * (max(near) - min(near)) or 0.1
    low, high = min(near) - room, max(near) + room
    shown = {i: min(perplexity[i], high) for i in finite}
    for i in finite:
        marker = "^" if perplexity[i] > limit else "o" if on_front[i] else "x"
        colour = GREEN if on_front[i] else MUTED
        ax.plot(gigabytes[i], shown[i], marker=marker, color=colour, linestyle="none", clip_on=False)
    missing = [labels[i] for i in range(len(labels)) if i not in finite]
    if missing:
        text = textwrap.fill(f"NaN: {', '.join(missing)}", _LETTERS_BELOW, break_on_hyphens=False)
        ax.text(0, -0.2, text, transform=ax.transAxes, va="top", fontsize=7.5, color=RED)
    ax.margins(x=0.08)
    ax.set_ylim(low, high)
    ax.grid(visible=False)  # its lines and those of the labels are told apart by nothing
    to_point = {"arrowstyle": "-", "color": GRID, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 0}
    beside = {"textcoords": "axes fraction", "va": "center", "fontsize": 8, "color": INK, "arrowprops": to_point}
    lowest_first = sorted(finite, key=lambda i: perplexity[i])
    heights = apart([(shown[i] - low) / (high - low) for i in lowest_first])
    for i, height in zip(lowest_first, heights, strict=True):
        text = labels[i] if perplexity[i] <= limit else f"{labels[i]}: {decimals(perplexity[i], 1)}"
        ax.annotate(text, (gigabytes[i], shown[i]), xytext=(1.02, height), **beside)
    ax.set(xlabel="sent in private inference (GB)", ylabel="validation perplexity")
    return ax


def trade_off_size(labels: Sequence[str]) -> tuple[float, float]:
    """Inches that leave the points room beside the labels."""
    longest = max(map(len, labels))
    return 5.8 + 0.06 * max(0, longest - 25), max(2.9, 0.8 + 0.17 * len(labels))


def apart(heights: Sequence[float]) -> list[float]:
    """Rising heights of the axes (0 to 1), moved as little as keeps a row between each two and the last one inside."""
    row = min(_ROW, 1 / max(1, len(heights)))
    rows = row * np.arange(len(heights))
    return (np.maximum.accumulate(heights - rows).clip(max=1 - rows[-1:]) + rows).tolist()
