"""Bars and points: heads per range of entropy, perplexity over slopes.  R ranges"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from normfree.analysis.entropy import RANGES, RangeCounts
from normfree.analysis.groups import Group, perplexities_on_common_seeds
from normfree.analysis.verdicts import fixed_slope
from normfree.plots.style import GREEN, INK, MUTED, RED, empty, legend_below, wrapped

_RANGE_COLOURS = [mpl.colormaps["viridis"](x) for x in (0.05, 0.37, 0.68, 0.98)]
_RANGE_INKS = ("#ffffff", "#ffffff", "#000000", "#000000")
_ROOM_FOR_TEXT = 0.09


def range_bars(counts: Mapping[str, RangeCounts], *, ax: Axes, title: str = "") -> Axes:
    """One stacked bar a model: percent of its heads in each quarter; non-finite heads are hatched."""
    if not counts:
        return empty(ax, "no entropy recorded")
    for row, found in enumerate(counts.values()):
        left = 0.0
        pieces = [*found.shares, found.nonfinite / found.heads]
        for quarter, share in enumerate(pieces):
            _piece(ax, row, left, share, quarter)
            left += share
    ax.set_yticks(range(len(counts)), [wrapped(name) for name in counts])
    ax.set_ylim(len(counts) - 0.5, -0.5)
    ax.set(title=title, xlabel="heads (%)", xlim=(0, 100))
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines["left"].set_visible(False)
    handles = [Patch(color=colour, label=name) for colour, name in zip(_RANGE_COLOURS, RANGES, strict=True)]
    if any(found.nonfinite for found in counts.values()):
        handles.append(Patch(facecolor="none", edgecolor=MUTED, hatch="////", label="NaN"))
    legend_below(ax, columns=5, handles=handles, columnspacing=0.9, handlelength=1, handletextpad=0.4)
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
    if not fixed:
        return empty(ax, "no run with a fixed slope")
    cells = perplexities_on_common_seeds([group for group in groups if group.name in fixed])
    found = sorted(((fixed[name], cell) for name, cell in cells.items()), key=lambda item: item[0])
    whole = [(slope, cell) for slope, cell in found if not cell.nonfinite]
    means, deviations = [cell.mean for _, cell in whole], [cell.standard_deviation for _, cell in whole]
    ax.errorbar([slope for slope, _ in whole], means, yerr=deviations, color=GREEN, marker="o", capsize=3)
    for slope, cell in found:
        if cell.nonfinite:
            ax.text(
                slope,
                0.96,
                cell.text(),
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="top",
                color=RED,
            )
    # The paper's slopes span two decades and include 0.
    ax.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    ticks = sorted({slope for slope, _ in found})
    ax.set_xticks(ticks, [f"{slope:g}" for slope in ticks], color=INK)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(title=title, xlabel="slope below 0", ylabel="validation perplexity")
    return ax


def _piece(ax: Axes, row: int, left: float, share: float, quarter: int) -> None:
    if share == 0:
        return
    start, width = 100 * left, 100 * share
    if quarter == len(RANGES):
        ax.barh(row, width, left=start, height=0.72, color="none", edgecolor=MUTED, hatch="////", linewidth=0)
        return
    ax.barh(row, width, left=start, height=0.72, color=_RANGE_COLOURS[quarter])
    if share >= _ROOM_FOR_TEXT:
        ax.text(
            start + width / 2,
            row,
            f"{width:.0f}",
            ha="center",
            va="center",
            color=_RANGE_INKS[quarter],
            fontsize=7.5,
        )
