"""Points: perplexity of every seed, over slopes, and against communication."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from normfree.analysis.groups import Group, perplexities_on_common_seeds
from normfree.analysis.seeds import Difference, decimals, summarise
from normfree.analysis.verdicts import fixed_slope
from normfree.cost.tradeoff import Point
from normfree.report.plots.style import GREEN, GRID, INK, MUTED, RED, Styles, empty, wrapped

_BELOW_DOTS = 0.27
"""Distance of the mean below its seeds, in rows."""


def perplexity_points(groups: Sequence[Group], *, ax: Axes, styles: Styles) -> Axes:
    """Final validation perplexity: one row per variant, a dot per seed, and the mean with the sample deviation below.

    A row without a mean says `NaN (1/3)` if 1 of 3 seeds diverged. A seed far above the others is a number at the edge.
    """
    rows = [group for group in groups if group.runs]
    edge: dict[str, Any] = {"transform": ax.get_yaxis_transform()}
    small = {"va": "center", "fontsize": 7.5}
    limit = far_above([value for group in rows for value in group.perplexities.values()])
    for row, group in enumerate(rows):
        values = list(group.perplexities.values())
        colour, cell = styles[group.name]["color"], summarise(values)
        near = [value for value in values if value <= limit]
        seeds = ", ".join(f"seed {run.seed} {decimals(run.perplexity)}" for run in group.runs)
        ax.plot(
            near, [row] * len(near), "o", color=colour, markersize=4, alpha=0.75, gid=f"title:{group.name}: {seeds}"
        )
        if far := [decimals(value, 1) for value in values if limit < value < math.inf]:
            ax.text(0.99, row, f"{', '.join(far)} >", ha="right", color=INK, **edge, **small)
        if cell.n > 1 and cell.mean <= limit:
            bar = {"color": INK, "marker": "|", "markersize": 6, "capsize": 2, "linewidth": 0.9}
            ax.errorbar(cell.mean, row + _BELOW_DOTS, xerr=cell.standard_deviation, **bar)
        text, ink = (cell.text(), RED) if cell.nonfinite else (f"n = {cell.n}", MUTED)
        ax.text(1.02, row, text, color=ink, **edge, **small)
    ax.set_yticks(range(len(rows)), [wrapped(group.name) for group in rows])
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel="validation perplexity")
    ax.tick_params(axis="y", length=0)
    return ax


def difference_points(rows: Sequence[tuple[str, Sequence[float], Difference]], *, ax: Axes) -> Axes:
    """Paired differences in percent: a dot per seed, and the mean with its 95 % interval below."""
    for row, (name, values, difference) in enumerate(rows):
        near = [100 * value for value in values if math.isfinite(value)]
        seeds = f"title:{name}: {', '.join(f'{value:+.1f} %' for value in near)}"
        ax.plot(near, [row] * len(near), "o", color=MUTED, markersize=4, alpha=0.75, gid=seeds)
        if math.isfinite(difference.low):
            reach = 100 * (difference.high - difference.mean)
            bar = {"color": INK, "marker": "|", "markersize": 6, "capsize": 3, "linewidth": 1.4}
            ax.errorbar(100 * difference.mean, row + _BELOW_DOTS, xerr=reach, **bar)
    ax.axvline(0, color=INK, linewidth=1, zorder=1)
    ax.set_yticks(range(len(rows)), [wrapped(name) for name, _, _ in rows])
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel="difference in perplexity (%)")
    ax.tick_params(axis="y", length=0)
    return ax


def far_above(values: Sequence[float]) -> float:
    """The highest value drawn to scale; higher ones would squeeze three quarters of them into a quarter of the axis."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.inf
    lowest, upper = min(finite), float(np.quantile(finite, 0.75))
    return max(upper + 3 * (upper - lowest), lowest)


def slope_perplexity(groups: Sequence[Group], *, ax: Axes, title: str = "") -> Axes:
    """Final perplexity over the fixed slope below 0, on the seeds that all slopes share, with the sample deviation.

    A slope with a diverged seed is labelled NaN at the top.
    """
    slopes = {group.name: fixed_slope(group.runs[0]) for group in groups if group.runs}
    slope_of = {name: slope for name, slope in slopes.items() if slope is not None}
    cells = perplexities_on_common_seeds([group for group in groups if group.name in slope_of])
    points = sorted(((slope_of[name], cell) for name, cell in cells.items()), key=lambda point: point[0])
    finite = [(slope, cell.mean, cell.standard_deviation) for slope, cell in points if not cell.nonfinite]
    slope_N, mean_N, deviation_N = np.reshape(finite, (-1, 3)).T
    ax.errorbar(slope_N, mean_N, deviation_N, color=GREEN, marker="o", capsize=3)
    above = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top", "color": RED}
    for slope, cell in points:
        if cell.nonfinite:
            ax.text(slope, 0.96, cell.text(), **above)
    ax.set_xscale("symlog", linthresh=0.01, linscale=0.5)  # the paper's slopes span two decades and include 0
    ticks = sorted({slope for slope, _ in points})
    ax.set_xticks(ticks, [f"{slope:g}" for slope in ticks], color=INK)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(title=title, xlabel="slope below 0", ylabel="validation perplexity")
    return ax


def trade_off_points(points: Sequence[Point], *, ax: Axes) -> Axes:
    """Perplexity over communication: one point per variant, and the Pareto front of each corpus as steps.

    Names stand in a column at the right, lowest perplexity at the bottom, each with a line to its point. A variant
    without a finite perplexity is only named; one far above the others is an arrow at the top.
    """
    finite = sorted((point for point in points if math.isfinite(point.perplexity)), key=lambda point: point.perplexity)
    if not finite:
        return empty(ax, "no variant has a finite perplexity")
    for corpus in dict.fromkeys(point.corpus for point in finite):
        front = sorted((p.bytes / 1e9, p.perplexity) for p in finite if p.on_front and p.corpus == corpus)
        ax.step([x for x, _ in front], [y for _, y in front], where="post", color=GREEN, linewidth=1, zorder=1)
    limit = far_above([point.perplexity for point in finite])
    near = [point.perplexity for point in finite if point.perplexity <= limit]
    room = 0.1 * (near[-1] - near[0]) or 0.1
    low, high = near[0] - room, near[-1] + room
    to_point = {"arrowstyle": "-", "color": GRID, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 0}
    column = {"textcoords": "axes fraction", "va": "center", "fontsize": 8, "color": INK, "arrowprops": to_point}
    for point, height in zip(finite, np.linspace(0.02, 0.98, len(finite)), strict=True):
        place = (point.bytes / 1e9, min(point.perplexity, high))
        is_far = point.perplexity > limit
        marker, colour = "^" if is_far else "o" if point.on_front else "x", GREEN if point.on_front else MUTED
        ax.plot(*place, marker=marker, color=colour, linestyle="none", clip_on=False)
        text = f"{point.name}: {decimals(point.perplexity, 1)}" if is_far else point.name
        ax.annotate(text, place, xytext=(1.02, height), **column)
    if missing := [point.name for point in points if not math.isfinite(point.perplexity)]:
        text = textwrap.fill(f"NaN: {', '.join(missing)}", 70, break_on_hyphens=False)
        ax.text(0, -0.2, text, transform=ax.transAxes, va="top", fontsize=7.5, color=RED)
    ax.margins(x=0.08)
    ax.grid(visible=False)  # its lines look like those of the names
    ax.set(xlabel="sent in private inference (GB)", ylabel="validation perplexity", ylim=(low, high))
    return ax
