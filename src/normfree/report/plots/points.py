"""Points: the score of every seed, its differences, and perplexity against communication."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from normfree.analysis.groups import Group, score_of
from normfree.analysis.pairs import Pair
from normfree.analysis.seeds import decimals, summarise
from normfree.cost.totals import Point
from normfree.report.plots.style import GREEN, GRID, INK, MUTED, RED, Styles, empty, plain_ticks, wrapped

NAME_LETTERS = 22  # of a line in the column of names of a trade-off


def score_points(groups: Sequence[Group], *, ax: Axes, styles: Styles) -> Axes:
    """Final score, e.g. perplexity: one row per variant, a dot per seed, and the mean with the sample deviation below.

    A row without a mean says e.g. `NaN (1/3)`. With a seed far above the others the axis is logarithmic.
    """
    rows = [group for group in groups if group.runs]
    for row, group in enumerate(rows):
        values, colour = list(group.scores.values()), styles[group.name]["color"]
        cell, seeds = summarise(values), ", ".join(f"seed {run.seed} {decimals(run.score)}" for run in group.runs)
        _dots_above_mean(ax, row, values, cell.mean, cell.standard_deviation, colour, f"{group.name}: {seeds}")
        text, ink = (cell.text(), RED) if cell.nonfinite else (f"n = {cell.n}", MUTED)
        ax.text(1.02, row, text, color=ink, transform=ax.get_yaxis_transform(), va="center", fontsize=7.5)
    if _is_wide([value for group in rows for value in group.scores.values()]):
        ax.set_xscale("log")
        plain_ticks(ax.xaxis)
    return _name_rows(ax, [group.name for group in rows], score_of(rows).axis)


def difference_points(pairs: Sequence[Pair], *, ax: Axes) -> Axes:
    """Paired differences of the score in percent or points: a dot per seed, and the mean with its 95 % interval."""
    for row, pair in enumerate(pairs):
        ours, theirs, difference, score = pair.ours.scores, pair.theirs.scores, pair.score(), pair.ours.score
        scores = [(ours[seed], theirs[seed]) for seed in pair.seeds]
        percents = [100 * (a / b - 1) if score.relative else a - b for a, b in scores]
        hover = f"{pair.name}: {', '.join(f'{percent:+.1f} {score.unit}' for percent in percents)}"
        reach = 100 * (difference.high - difference.mean)
        _dots_above_mean(ax, row, percents, 100 * difference.mean, reach, MUTED, hover)
    ax.axvline(0, color=INK, linewidth=1, zorder=1)
    score = score_of([pair.ours for pair in pairs])
    return _name_rows(ax, [pair.name for pair in pairs], f"difference in {score.name} ({score.unit})")


def _dots_above_mean(
    ax: Axes, row: int, values: Sequence[float], mean: float, reach: float, colour: str, hover: str
) -> None:
    """A dot per finite value, and their mean with a bar below if the reach of the bar is finite."""
    finite = [value for value in values if math.isfinite(value)]
    ax.plot(finite, [row] * len(finite), "o", color=colour, markersize=4, alpha=0.75, gid=f"title:{hover}")
    if math.isfinite(reach):
        ax.errorbar(mean, row + 0.27, xerr=reach, color=INK, marker="|", markersize=6, capsize=2.5, linewidth=1.1)


def _name_rows(ax: Axes, names: Sequence[str], label: str) -> Axes:
    ax.set_yticks(range(len(names)), [wrapped(name) for name in names])
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel=label)
    ax.tick_params(axis="y", length=0)
    return ax


def _is_wide(values: Sequence[float]) -> bool:
    """Whether one of the values is so far above the others that only a logarithmic axis shows them all."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and max(finite) > 2 * float(np.median(finite))


def trade_off_points(points: Sequence[Point], *, ax: Axes) -> Axes:
    """Perplexity over communication: one point per variant, and the Pareto front of each corpus as steps.

    Names stand in a column at the right in the order of perplexity, each with a line to its point. A variant without a
    finite perplexity is only named. With one far above the others the axis is logarithmic.
    """
    finite = sorted((point for point in points if math.isfinite(point.perplexity)), key=lambda point: point.perplexity)
    if not finite:
        return empty(ax, "no variant has a finite perplexity")
    for corpus in dict.fromkeys(point.corpus for point in finite):
        front = sorted((p.bytes / 1e9, p.perplexity) for p in finite if p.on_front and p.corpus == corpus)
        ax.step([x for x, _ in front], [y for _, y in front], where="post", color=GREEN, linewidth=1, zorder=1)
    to_point = {"arrowstyle": "-", "color": GRID, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 0}
    column = {"textcoords": "axes fraction", "va": "center", "fontsize": 8, "color": INK, "arrowprops": to_point}
    for point, height in zip(finite, np.linspace(0.02, 0.98, len(finite)), strict=True):
        place = (point.bytes / 1e9, point.perplexity)
        marker, colour = ("o", GREEN) if point.on_front else ("x", MUTED)
        ax.plot(*place, marker=marker, color=colour, linestyle="none", clip_on=False)
        ax.annotate(wrapped(point.name, NAME_LETTERS), place, xytext=(1.02, height), **column)
    if missing := [point.name for point in points if not math.isfinite(point.perplexity)]:
        text = textwrap.fill(f"NaN: {', '.join(missing)}", 70, break_on_hyphens=False)
        ax.text(0, -0.2, text, transform=ax.transAxes, va="top", fontsize=7.5, color=RED)
    if _is_wide([point.perplexity for point in finite]):
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)
    ax.margins(x=0.08)
    ax.grid(visible=False)  # its lines look like those of the names
    ax.set(xlabel="sent in private inference (GB)", ylabel="validation perplexity")
    return ax
