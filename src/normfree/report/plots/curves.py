"""What happens over training: layers, losses, non-finite rows, slopes.  L layers, S slopes"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator, NullLocator

from normfree.analysis.entropy import layer_means, probed_heads, top_quarter_share
from normfree.analysis.groups import Group, is_over
from normfree.analysis.quantities import values_over_training
from normfree.analysis.verdicts import slope_layers
from normfree.report.plots.style import INK, LEGEND_LETTERS, MUTED, RED, Styles, empty, wrapped
from normfree.store.runs import Run

# Lightness rises with depth, from 39 to 68, as far as a line shows on white and on the page's dark ground alike.
LAYER_COLOURS = LinearSegmentedColormap.from_list(
    "layers", ["#005cab", "#5e5bb2", "#9e55ad", "#d34e89", "#e95c67", "#ea7945", "#d49c2a"]
)
_MOST_POINTS = 200
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
    """A quantity of every layer over training, mean over its heads, from the first layer (blue) to the last (orange).

    `history` is (step, values [L] or [L, H]), `label` that of the y axis. `layers`: of the deepest model, where several
    share one colour bar. The dashed line is the ceiling. A layer with a non-finite head has no mean: its line ends, and
    a vertical line marks the first such step.
    """
    steps = [step for step, _ in history]
    mean_LN = np.array([layer_means(values) for _, values in history]).T
    for layer, mean_N in enumerate(mean_LN):
        _line(ax, steps, mean_N, color=_layer_colour(layer, layers or len(mean_LN)))
    if ceiling is not None:
        ax.axhline(ceiling, color=MUTED, linestyle="--", linewidth=1)
        ax.set_ylim(0, 1.08 * ceiling)
    _mark_nonfinite(ax, steps, mean_LN)
    ax.set(title=wrapped(title), xlabel="step", ylabel=label)
    return ax


def depth_profile(
    values: Mapping[str, tuple[Sequence[int], np.ndarray]], *, ax: Axes, label: str, styles: Styles
) -> Axes:
    """A quantity over the layers, one line a variant: its layer numbers and values [L], by name."""
    for name, (numbers, value_L) in values.items():
        ax.plot(numbers, value_L, marker=".", label=name, **styles[name])
    ax.set(xlabel="layer", ylabel=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def scalar_curves(groups: Sequence[Group], name: str, *, ax: Axes, label: str, styles: Styles) -> Axes:
    """A quantity of the whole model over training: a line a variant, the mean of its seeds, over a thin line a seed."""

    def series(run: Run) -> Series:
        history = values_over_training(run, name)
        return [step for step, _ in history], np.array([value for _, value in history])

    _line_a_seed(groups, series, ax=ax, styles=styles, mean=True)
    ax.set(xlabel="step", ylabel=label)
    return ax


def loss_curves(groups: Sequence[Group], *, ax: Axes, split: str, styles: Styles, title: str = "") -> Axes:
    """Loss over training: a line a variant, the mean of its seeds with a result, over a thin line a seed.

    `split` is `train` (running mean over about a fiftieth of the points) or `validation`. The y axis leaves out the
    first fifth of the training, whose fall would hide what follows. The mean ends where a seed does.
    A cross marks the step of a divergence, or the first loss that is not finite; its line ends or has a gap there.
    """

    def shown(run: Run) -> Series:
        steps, loss = _series(run, split, "loss")
        if split == "train" and steps:
            loss = _running_mean(loss, max(1, len(loss) // _TRAIN_WINDOWS))
        return steps, loss

    _line_a_seed(groups, shown, ax=ax, styles=styles, mean=True)
    if not ax.lines:
        return empty(ax, f"no {split} loss recorded")
    late = [np.array([])]
    for run in (run for group in groups for run in group.drawn):
        steps, loss = shown(run)
        late += [loss[np.array(steps) >= run.facts["steps"] / 5], loss[-1:] if not is_over(run) else loss[:0]]
    ax.set_ylim(_limits(np.concatenate(late)))
    _cross_divergences(groups, split, ax=ax, styles=styles)
    ax.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    return ax


def nonfinite_curves(groups: Sequence[Group], *, ax: Axes, styles: Styles) -> Axes:
    """Attention rows with NaN or infinity, in percent of the rows of each probe; linear below 1 %, logarithmic above.

    A cross marks the step of a divergence, or the first training loss that is not finite.
    """

    def share(run: Run) -> Series:
        rows = dict(run.series("probe", "rows"))
        found = [(step, bad_LH) for step, bad_LH in run.series("probe", "nonfinite_rows") if step in rows]
        percents = [100 * np.sum(bad_LH) / (np.sum(rows[step]) or np.nan) for step, bad_LH in found]
        return [step for step, _ in found], np.array(percents)

    _line_a_seed(groups, share, ax=ax, styles=styles, marker=".", markersize=4)
    _cross_divergences(groups, "train", ax=ax, styles=styles)
    ax.set_yscale("symlog", linthresh=1)
    ax.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="step", ylabel="non-finite rows (%)", ylim=(-0.1, 150))
    return ax


def overload_curves(groups: Sequence[Group], *, ax: Axes, styles: Styles) -> Axes:
    """Heads at or above 3/4 of the causal ceiling, in percent of all heads of each probe, one thin line a seed.

    A line has a gap where a head is not finite.
    """

    def share(run: Run) -> Series:
        probes = probed_heads(run)
        return [heads.step for heads in probes], np.array([100 * top_quarter_share(heads) for heads in probes])

    _line_a_seed(groups, share, ax=ax, styles=styles)
    ax.set(xlabel="step", ylabel="heads in the top quarter (%)", ylim=(-3, 103))
    return ax


def curves_size(panels: Sequence[Sequence[Group]]) -> tuple[float, float]:
    """Inches that give curves of these groups, and the legend below them, room."""
    lines = max(sum(wrapped(g.name, LEGEND_LETTERS).count("\n") + 1 for g in groups) for groups in panels)
    return 3.9, 2.75 + 0.08 * lines


def slope_curves(
    run: Run,
    *,
    ax: Axes,
    title: str = "",
    layers: int | None = None,
    limits: tuple[float, float] | None = None,
) -> Axes:
    """Learnable slopes over training: one line a layer, or one line for a shared slope; a straight one at 0, ReLU.

    `layers`: as above. `limits` of the y axis: those of `slope_limits`, where panels are to be compared.
    """
    steps, slope_SN = _slopes(run)
    if not steps:
        return empty(ax, "no learnable slope in this run")
    layer_S, deepest = slope_layers(run), layers or run.facts["model"]["layers"]
    colours = [_layer_colour(layer, deepest) for layer in layer_S] or [MUTED]
    for slope_N, colour in zip(slope_SN, colours, strict=True):
        _line(ax, steps, slope_N, color=colour)
    ax.axhline(0, color=INK, linewidth=1, zorder=1)
    _mark_nonfinite(ax, steps, slope_SN)
    ax.set(title=wrapped(title), xlabel="step", ylabel="slope of the layer" if layer_S else "shared slope")
    ax.set_ylim(limits)
    return ax


def slope_limits(runs: Sequence[Run]) -> tuple[float, float] | None:
    """A y axis that holds every finite slope of the runs, and 0."""
    return _limits(np.concatenate([np.zeros(1), *(_slopes(run)[1].ravel() for run in runs)]))


def _limits(values: np.ndarray) -> tuple[float, float] | None:
    """A y axis that holds every finite value; None when there is none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room


def _slopes(run: Run) -> Series:
    """Probed steps and slopes [S, steps]."""
    series = run.series("probe", "negative_slope")
    rows = [np.atleast_1d(np.array(value, dtype=float)) for _, value in series]
    return [step for step, _ in series], np.array(rows).T


def _line_a_seed(
    groups: Sequence[Group],
    series: Callable[[Run], Series],
    *,
    ax: Axes,
    styles: Styles,
    mean: bool = False,
    **more: Any,
) -> None:
    """Draw `series` of every run, one line of a group with its name for the legend.

    `mean`: draw seeds of several thin, and their mean. An open circle ends the line of a run that is not over.
    """
    for group in groups:
        label, style = group.name, {**styles[group.name], **more}
        if mean and len(group.runs) > 1 and (average := _mean(list(map(series, group.runs))))[0]:
            _line(ax, *average, label=label, zorder=3, **style)
            label, style = None, {**style, **_SEED_BESIDE_MEAN}
        for run in group.drawn:
            steps, values = series(run)
            if not steps:
                continue
            _line(ax, steps, values, label=label, **style)
            label = None
            if not is_over(run):
                ax.plot(steps[-1:], values[-1:], "o", fillstyle="none", color=style["color"])


def _mean(lines: Sequence[Series]) -> Series:
    """Over seeds, at the steps that all of them have."""
    of_seed = [dict(zip(*line, strict=True)) for line in lines]
    steps = sorted(set.intersection(*map(set, of_seed)))
    return steps, np.array([[values[step] for step in steps] for values in of_seed], dtype=float).mean(axis=0)


def _line(ax: Axes, steps: Sequence[int], values: np.ndarray, **style: Any) -> None:
    """Draw at most about 200 of the points, the last one among them."""
    stride = max(1, -(-len(steps) // _MOST_POINTS))
    drawn = sorted({*range(0, len(steps), stride), *range(len(steps))[-1:]})
    ax.plot([steps[i] for i in drawn], np.asarray(values)[drawn], **style)


def _cross_divergences(groups: Sequence[Group], split: str, *, ax: Axes, styles: Styles) -> None:
    """Mark the first loss of each run that is not finite, and the step of its divergence, which is never logged."""
    for colour, run in ((styles[group.name]["color"], run) for group in groups for run in group.drawn):
        bad = [step for step, value in zip(*_series(run, split, "loss"), strict=True) if not np.isfinite(value)]
        if divergence := run.facts.get("divergence"):
            bad.append(divergence["step"])
        if bad:
            place = {"transform": ax.get_xaxis_transform(), "clip_on": False}
            ax.plot([min(bad)], [0.97], "x", color=colour, **place)


def _mark_nonfinite(ax: Axes, steps: Sequence[int], values_LN: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(values_LN).all(axis=0))
    if bad.size:
        step = steps[bad[0]]
        ax.axvline(step, color=RED, linestyle=":", linewidth=1.2)
        ax.text(step, 0.04, f" NaN from step {step} ", color=RED, transform=ax.get_xaxis_transform(),
                ha="right" if step > steps[-1] / 2 else "left", fontsize=7.5)  # fmt: skip


def _series(run: Run, split: str, name: str) -> tuple[list[int], np.ndarray]:
    found = run.series(split, name)
    return [step for step, _ in found], np.array([value for _, value in found], dtype=float)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values; NaN wherever one of them is not finite."""
    padded = np.concatenate([np.repeat(values[:1], window - 1), values])
    return np.lib.stride_tricks.sliding_window_view(padded, window).mean(axis=1)


def _layer_colour(layer: int, layers: int) -> tuple[float, ...]:
    return LAYER_COLOURS(layer / max(1, layers - 1))
