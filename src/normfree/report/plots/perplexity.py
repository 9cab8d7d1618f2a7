"""Final perplexity, one dot a seed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from normfree.analysis.groups import Group
from normfree.analysis.seeds import decimals, summarise
from normfree.report.plots.style import INK, MUTED, RED, Styles, wrapped

_BELOW_DOTS = 0.27
"""Where the mean stands below its seeds, in rows."""


def perplexity_points(groups: Sequence[Group], *, ax: Axes, styles: Styles) -> Axes:
    """Final validation perplexity: a row a variant, a dot a seed, and below them the mean with the sample deviation.

    Beside each row stands its number of seeds, or `NaN (1/3)`, and then no mean, when 1 of 3 diverged. A seed far above
    the others is an arrow at the edge with its number, so that the others keep their room.
    """
    rows = [group for group in groups if group.runs]
    edge: dict[str, Any] = {"transform": ax.get_yaxis_transform()}
    small = {"va": "center", "fontsize": 7.5}
    limit = far_above([value for group in rows for value in group.perplexities.values()])
    for row, group in enumerate(rows):
        values = list(group.perplexities.values())
        colour, cell = styles[group.name]["color"], summarise(values)
        near = [value for value in values if value <= limit]
        ax.plot(near, [row] * len(near), "o", color=colour, markersize=4, alpha=0.75)
        if far := [value for value in values if limit < value < math.inf]:
            ax.plot(0.985, row, ">", color=colour, markersize=4, **edge)
            ax.text(0.96, row, ", ".join(decimals(value, 1) for value in far), ha="right", color=INK, **edge, **small)
        if cell.n > 1 and cell.mean <= limit:
            bar = {"color": INK, "marker": "|", "markersize": 6, "capsize": 2, "linewidth": 0.9}
            ax.errorbar(cell.mean, row + _BELOW_DOTS, xerr=cell.standard_deviation, **bar)
        text, ink = (cell.text(), RED) if cell.nonfinite else (f"n = {cell.n}", MUTED)
        ax.text(1.02, row, text, color=ink, **edge, **small)
    ax.set_yticks(range(len(rows)), [wrapped(group.name) for group in rows])
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel="validation perplexity")
    ax.tick_params(axis="y", length=0)
    return ax


def perplexity_points_size(names: Collection[str]) -> tuple[float, float]:
    """Inches that give every row and the lines of its name room."""
    lines = max(wrapped(name).count("\n") + 1 for name in names)
    return 4.2, 0.8 + len(names) * max(0.25, 0.15 * lines)


def far_above(values: Sequence[float]) -> float:
    """The highest value to draw to scale: what lies above would squeeze three quarters of them into a quarter."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.inf
    lowest, upper = min(finite), float(np.quantile(finite, 0.75))
    return max(upper + 3 * (upper - lowest), lowest)
