"""Bars and points: heads per range of entropy, perplexity over slopes.  R ranges"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from normfree.analysis.entropy import RANGES, RangeCounts
from normfree.analysis.groups import Group, perplexities_on_common_seeds
from normfree.analysis.verdicts import fixed_slope
from normfree.report.plots.style import GREEN, INK, MUTED, RED, wrapped

_PIECES: list[dict[str, Any]] = [{"color": mpl.colormaps["viridis"](x)} for x in (0.05, 0.37, 0.68, 0.98)]
_PIECES.append({"color": "none", "edgecolor": MUTED, "hatch": "////", "linewidth": 0})
_INKS = ("#ffffff", "#ffffff", "#000000", "#000000", "none")
_ROOM_FOR_TEXT = 9


def range_bars(counts: Mapping[str, RangeCounts], *, ax: Axes, title: str = "") -> Axes:
    """One stacked bar a model: percent of its heads in each quarter; non-finite heads are hatched."""
    percent_MR = 100 * np.array([[*found.shares, found.nonfinite / found.heads] for found in counts.values()])
    left_M = np.zeros(len(counts))
    for name, width_M, style, ink in zip((*RANGES, "NaN"), percent_MR.T, _PIECES, _INKS, strict=True):
        if name in RANGES or width_M.any():
            bars = ax.barh(range(len(counts)), width_M, left=left_M, height=0.72, label=name, **style)
            texts = [f"{width:.0f}" if width >= _ROOM_FOR_TEXT else "" for width in width_M]
            ax.bar_label(bars, texts, label_type="center", color=ink, fontsize=7.5)
        left_M = left_M + width_M
    ax.set_yticks(range(len(counts)), [wrapped(name) for name in counts])
    ax.set_ylim(len(counts) - 0.5, -0.5)
    ax.set(title=title, xlabel="heads (%)", xlim=(0, 100))
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines["left"].set_visible(False)
    return ax


def range_bars_size(names: Collection[str]) -> tuple[float, float]:
    """Inches that give every bar and the lines of its name room."""
    lines = max(wrapped(name).count("\n") + 1 for name in names)
    return 3.9, 1.3 + len(names) * max(0.27, 0.15 * lines)


def slope_perplexity(groups: Sequence[Group], *, ax: Axes, title: str = "") -> Axes:
    """Final perplexity over the fixed slope below 0, on the seeds that all slopes have; bars are the sample
    deviation, which one seed has none of.

    A slope with a diverged seed stands as NaN at the top, never as a mean of survivors.
    """
    slopes = {group.name: fixed_slope(group.runs[0]) for group in groups if group.runs}
    fixed = {name: slope for name, slope in slopes.items() if slope is not None}
    cells = perplexities_on_common_seeds([group for group in groups if group.name in fixed])
    found = sorted(((fixed[name], cell) for name, cell in cells.items()), key=lambda item: item[0])
    whole = [(slope, cell.mean, cell.standard_deviation) for slope, cell in found if not cell.nonfinite]
    slope_N, mean_N, deviation_N = np.reshape(whole, (-1, 3)).T
    ax.errorbar(slope_N, mean_N, deviation_N, color=GREEN, marker="o", capsize=3)
    above = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top", "color": RED}
    for slope, cell in found:
        if cell.nonfinite:
            ax.text(slope, 0.96, cell.text(), **above)
    # The paper's slopes span two decades and include 0.
    ax.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    ticks = sorted({slope for slope, _ in found})
    ax.set_xticks(ticks, [f"{slope:g}" for slope in ticks], color=INK)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(title=title, xlabel="slope below 0", ylabel="validation perplexity")
    return ax
