"""Curves over training: layers, losses, non-finite rows, slopes.  L layers, S slopes, N steps"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator, NullLocator

from normfree.analysis.entropy import layer_means, probed_heads, top_quarter_share
from normfree.analysis.groups import Group, is_over
from normfree.analysis.series import values_over_training
from normfree.analysis.verdicts import slope_layers
from normfree.report.plots.style import INK, MUTED, RED, Styles, empty, wrapped
from normfree.store.runs import Run

# Lightness rises with depth from 39 to 68, the range that is visible on both white and the page's dark background.
LAYER_COLOURS = LinearSegmentedColormap.from_list(
    "layers", ["#005cab", "#5e5bb2", "#9e55ad", "#d34e89", "#e95c67", "#ea7945", "#d49c2a"]
)
_MOST_POINTS = 100
_TRAIN_WINDOWS = 50
_SEED_BESIDE_MEAN: dict[str, Any] = {"linewidth": 0.6, "linestyle": "-", "alpha": 0.55}

Series = tuple[list[int], np.ndarray]
"""Steps and values of one line."""


def layer_curves(
    history: Sequence[tuple[int, np.ndarray]],
    *,
    ax: Axes,
    label: str,
    title: str = "",
    layers: int | None = None,
    ceiling: float | None = None,
) -> Axes:
    """A quantity of every layer over training, averaged over its heads; blue is the first layer, orange the last.

    `history` is (step, values [L] or [L, H]), `label` that of the y axis, `layers` the depth of the deepest model that
    shares the colour bar. The dashed line is the ceiling. The line of a layer ends where a head is not finite, and a
    vertical line marks the first such step.
    """
    steps, mean_LN = [step for step, _ in history], np.array([layer_means(values) for _, values in history]).T
    _layer_lines(ax, steps, mean_LN, range(len(mean_LN)), layers or len(mean_LN))
    if ceiling is not None:
        ax.axhline(ceiling, color=MUTED, linestyle="--", linewidth=1)
        ax.set_ylim(0, 1.08 * ceiling)
    ax.set(title=wrapped(title), xlabel="step", ylabel=label)
    return ax


def slope_curves(run: Run, *, ax: Axes, title: str = "", layers: int | None = None) -> Axes:
    """Learnable slopes over training, one line per layer or one shared line, and a straight line at 0 for ReLU.

    `layers`: the depth of the deepest model that shares the colour bar.
    """
    steps, slope_NS = _series(run, "probe", "negative_slope")
    if not steps:
        return empty(ax, "no learnable slope in this run")
    layer_S = slope_layers(run)
    _layer_lines(ax, steps, slope_NS.T, layer_S, layers or run.facts["model"]["layers"])
    ax.axhline(0, color=INK, linewidth=1, zorder=1)
    ax.set(title=wrapped(title), xlabel="step", ylabel="slope of the layer" if layer_S else "shared slope")
    return ax


def depth_profile(
    values: Mapping[str, tuple[Sequence[int], np.ndarray]], *, ax: Axes, label: str, styles: Styles
) -> Axes:
    """A quantity over the layers, one line per variant: its layer numbers and values [L], by name."""
    for name, (numbers, value_L) in values.items():
        ax.plot(numbers, value_L, marker=".", label=name, gid=f"title:{name}", **styles[name])
    ax.set(xlabel="layer", ylabel=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def scalar_curves(groups: Sequence[Group], name: str, *, ax: Axes, label: str, styles: Styles) -> Axes:
    """A quantity over training, averaged over layers and heads: the mean of each variant, and a thin line per seed."""

    def series(run: Run) -> Series:
        history = values_over_training(run, name)
        return [step for step, _ in history], np.array([np.mean(value) for _, value in history])

    _line_per_seed(groups, series, ax=ax, styles=styles, mean=True)
    ax.set(xlabel="step", ylabel=label)
    return ax


def loss_curves(groups: Sequence[Group], *, ax: Axes, split: str, styles: Styles, title: str = "") -> Axes:
    """`train` or `validation` loss over training: the mean of each variant, and a thin line per seed.

    The training loss is a running mean over about a fiftieth of the points. The y axis excludes the first fifth of the
    training. The mean ends at the first divergence; a cross marks each divergence or first non-finite loss.
    """

    def shown(run: Run) -> Series:
        steps, loss = _series(run, split, "loss")
        if split == "train" and steps:
            loss = _running_mean(loss, max(1, len(loss) // _TRAIN_WINDOWS))
        return steps, loss

    _line_per_seed(groups, shown, ax=ax, styles=styles, mean=True)
    if not ax.lines:
        return empty(ax, f"no {split} loss recorded")
    late = [np.array([])]
    for run in (run for group in groups for run in group.drawn):
        steps, loss = shown(run)
        late += [loss[np.array(steps) >= run.facts["steps"] / 5], loss[-1:] if not is_over(run) else loss[:0]]
    late_loss = np.concatenate(late)
    if (finite := late_loss[np.isfinite(late_loss)]).size:
        room = 0.05 * np.ptp(finite) or 0.05
        ax.set_ylim(finite.min() - room, finite.max() + room)
    _cross_divergences(groups, split, ax=ax, styles=styles)
    ax.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    return ax


def nonfinite_curves(groups: Sequence[Group], *, ax: Axes, styles: Styles) -> Axes:
    """Attention rows with NaN or infinity in percent of each probe's rows; a cross marks a divergence.

    The y axis is linear below 1 % and logarithmic above.
    """

    def share(run: Run) -> Series:
        rows = dict(run.series("probe", "rows"))
        bad = [(step, bad_LH) for step, bad_LH in run.series("probe", "nonfinite_rows") if step in rows]
        percents = [100 * np.sum(bad_LH) / (np.sum(rows[step]) or np.nan) for step, bad_LH in bad]
        return [step for step, _ in bad], np.array(percents)

    _line_per_seed(groups, share, ax=ax, styles=styles, marker=".", markersize=4)
    _cross_divergences(groups, "train", ax=ax, styles=styles)
    ax.set_yscale("symlog", linthresh=1)
    ax.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="step", ylabel="non-finite rows (%)", ylim=(-0.1, 150))
    return ax


def overload_curves(groups: Sequence[Group], *, ax: Axes, styles: Styles) -> Axes:
    """Nearly uniform heads in percent of all heads of each probe, one line per seed; a non-finite head leaves a gap."""

    def share(run: Run) -> Series:
        probes = probed_heads(run)
        return [heads.step for heads in probes], np.array([100 * top_quarter_share(heads) for heads in probes])

    _line_per_seed(groups, share, ax=ax, styles=styles)
    ax.set(xlabel="step", ylabel="heads in the top quarter (%)", ylim=(-3, 103))
    return ax


def _layer_lines(ax: Axes, steps: Sequence[int], values_SN: np.ndarray, layer_S: Sequence[int], layers: int) -> None:
    """One line per layer, coloured by depth, or a grey one without layer; the first non-finite step is marked."""
    colours = [LAYER_COLOURS(layer / max(1, layers - 1)) for layer in layer_S] or [MUTED]
    for layer, value_N, colour in zip(layer_S or [None], values_SN, colours, strict=True):
        name = "all layers" if layer is None else f"layer {layer}"
        _line(ax, steps, value_N, color=colour, gid=f"title:{name}, ends at {value_N[-1]:.3f}")
    bad = np.flatnonzero(~np.isfinite(values_SN).all(axis=0))
    if bad.size:
        step = steps[bad[0]]
        ax.axvline(step, color=RED, linestyle=":", linewidth=1.2)
        place = {"transform": ax.get_xaxis_transform(), "ha": "right" if step > steps[-1] / 2 else "left"}
        ax.text(step, 0.04, f" NaN from step {step} ", color=RED, fontsize=7.5, **place)


def _line_per_seed(
    groups: Sequence[Group],
    series: Callable[[Run], Series],
    *,
    ax: Axes,
    styles: Styles,
    mean: bool = False,
    **more: Any,
) -> None:
    """Draw `series` of every run; one line per group has its name for the legend.

    `mean`: draw the mean of several seeds, and the seeds as thin lines. An open circle ends the line of an unfinished
    run.
    """
    for group in groups:
        label, style = group.name, {**styles[group.name], **more}
        if mean and len(group.runs) > 1:
            lines = [dict(zip(*series(run), strict=True)) for run in group.runs]
            if steps := sorted(set.intersection(*map(set, lines))):
                average = np.array([[line[step] for step in steps] for line in lines], dtype=float).mean(axis=0)
                _line(ax, steps, average, label=label, zorder=3, gid=f"title:{label}, mean", **style)
                label, style = None, {**style, **_SEED_BESIDE_MEAN}
        for run in group.drawn:
            steps, values = series(run)
            if not steps:
                continue
            _line(ax, steps, values, label=label, gid=f"title:{group.name}, seed {run.seed}: {values[-1]:.3f}", **style)
            label = None
            if not is_over(run):
                ax.plot(steps[-1:], values[-1:], "o", fillstyle="none", color=style["color"])


def _line(ax: Axes, steps: Sequence[int], values: np.ndarray, **style: Any) -> None:
    """Draw about 100 of the points, including the last one."""
    stride = max(1, -(-len(steps) // _MOST_POINTS))
    drawn = sorted({*range(0, len(steps), stride), *range(len(steps))[-1:]})
    ax.plot([steps[i] for i in drawn], np.asarray(values)[drawn], **style)


def _cross_divergences(groups: Sequence[Group], split: str, *, ax: Axes, styles: Styles) -> None:
    """Mark the first non-finite loss of each run, or its divergence, whose own loss is never logged."""
    for colour, run in ((styles[group.name]["color"], run) for group in groups for run in group.drawn):
        bad = [step for step, value in zip(*_series(run, split, "loss"), strict=True) if not np.isfinite(value)]
        if divergence := run.facts.get("divergence"):
            bad.append(divergence["step"])
        if bad:
            place = {"transform": ax.get_xaxis_transform(), "clip_on": False}
            ax.plot([min(bad)], [0.97], "x", color=colour, **place)


def _series(run: Run, split: str, name: str) -> Series:
    series = run.series(split, name)
    return [step for step, _ in series], np.array([value for _, value in series], dtype=float)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values; NaN if one of them is not finite."""
    padded = np.concatenate([np.repeat(values[:1], window - 1), values])
    return np.lib.stride_tricks.sliding_window_view(padded, window).mean(axis=1)
