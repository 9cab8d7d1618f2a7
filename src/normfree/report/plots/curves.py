"""Curves over training and over depth.  L layers, N steps"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from normfree.analysis.entropy import layer_means, probed_heads, top_quarter_share, values_over_training
from normfree.analysis.groups import Group
from normfree.report.plots.style import INK, MUTED, RED, Styles, empty, wrapped
from normfree.spec.families import CLASSIFICATIONS
from normfree.store.runs import Run

# Lightness rises with depth from 39 to 68, the range that is visible on both white and the page's dark background.
LAYER_COLOURS = LinearSegmentedColormap.from_list(
    "layers", ["#005cab", "#5e5bb2", "#9e55ad", "#d34e89", "#e95c67", "#ea7945", "#d49c2a"]
)
Series = tuple[list[int], np.ndarray]  # steps and values of one line


def layer_curves(
    history: Sequence[tuple[int, np.ndarray]],
    *,
    ax: Axes,
    label: str,
    numbers: Sequence[int],
    deepest: int,
    title: str = "",
    ceiling: float | None = None,
) -> Axes:
    """A quantity of every layer over training, averaged over its heads; blue is the first layer, orange the last.

    `history` is (step, values [L] or [L, H]), `numbers` those of the layers (none: one grey line for all of them),
    `deepest` the last layer of all models that share the colour bar. The dashed line is the ceiling. The line of a
    layer ends where a head is not finite, and a vertical line marks the first such step.
    """
    steps, mean_LN = [step for step, _ in history], np.array([layer_means(values) for _, values in history]).T
    for place, mean_N in enumerate(mean_LN):
        name, colour = "all layers", MUTED
        if numbers:
            name, colour = f"layer {numbers[place]}", LAYER_COLOURS(numbers[place] / max(1, deepest))
        _line(ax, steps, mean_N, color=colour, gid=f"title:{name}, ends at {mean_N[-1]:.3f}")
    bad = np.flatnonzero(~np.isfinite(mean_LN).all(axis=0))
    if bad.size:
        step = steps[bad[0]]
        ax.axvline(step, color=RED, linestyle=":", linewidth=1.2)
        place = {"transform": ax.get_xaxis_transform(), "ha": "right" if step > steps[-1] / 2 else "left"}
        ax.text(step, 0.04, f" NaN from step {step} ", color=RED, fontsize=7.5, **place)
    if (mean_LN < 0).any():
        ax.axhline(0, color=INK, linewidth=1, zorder=1)
    if ceiling is not None:
        ax.axhline(ceiling, color=MUTED, linestyle="--", linewidth=1)
        ax.set_ylim(0, 1.08 * ceiling)
    ax.set(title=wrapped(title), xlabel="step", ylabel=label)
    return ax


def depth_profile(
    profiles: Mapping[str, tuple[Sequence[int], np.ndarray]], *, ax: Axes, label: str, styles: Styles
) -> Axes:
    """A quantity over the layers, one line per variant: its layers' numbers and values [L], by name."""
    for name, (numbers, value_L) in profiles.items():
        ax.plot(numbers, value_L, marker=".", label=name, gid=f"title:{name}", **styles[name])
    ax.set(xlabel="layer", ylabel=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def seed_curves(
    groups: Sequence[Group], series: Callable[[Run], Series], *, ax: Axes, label: str, styles: Styles
) -> Axes:
    """One line per run: of several seeds thin lines, and a thick one for their mean, which has the legend's name.

    An open circle ends the line of an unfinished run; a value that is not finite leaves a gap.
    """
    for group in groups:
        name, style = group.name, dict(styles[group.name])
        legend = {"label": name}
        if len(group.runs) > 1:
            lines = [dict(zip(*series(run), strict=True)) for run in group.runs]
            if steps := sorted(set.intersection(*map(set, lines))):
                average = np.array([[line[step] for step in steps] for line in lines], dtype=float).mean(axis=0)
                _line(ax, steps, average, zorder=3, gid=f"title:{name}, mean", **legend, **style)
                legend, style = {}, style | {"linewidth": 0.6, "linestyle": "-", "alpha": 0.55}
        for run in group.members:
            steps, values = series(run)
            if not steps:
                continue
            _line(ax, steps, values, gid=f"title:{name}, seed {run.seed}: {values[-1]:.3f}", **legend, **style)
            legend = {}
            if not run.has_result:
                ax.plot(steps[-1:], values[-1:], "o", fillstyle="none", color=style["color"])
    ax.set(xlabel="step", ylabel=label)
    return ax


def loss_curves(groups: Sequence[Group], *, ax: Axes, split: str, styles: Styles, title: str = "") -> Axes:
    """`train` or `validation` loss over training: the mean of each variant, and a thin line per seed.

    The training loss is a running mean over about a fiftieth of the points. The y axis excludes the first fifth of the
    training. The mean ends at the first divergence; a cross marks each divergence or first non-finite loss.
    """

    def smoothed(run: Run) -> Series:
        steps, loss_N = loss_series(run, split)
        if split == "train" and steps:
            loss_N = _running_mean(loss_N, max(1, len(loss_N) // 50))
        return steps, loss_N

    of_tokens = all(group.members[0].family.causal for group in groups)
    tasks = {group.members[0].spec["train"].get("objective") for group in groups} & CLASSIFICATIONS.keys()
    label = "loss of classes (nats)" if tasks and split == "train" else f"loss (nats{' per token' * of_tokens})"
    seed_curves(groups, smoothed, ax=ax, label=label, styles=styles)
    if not ax.lines:
        return empty(ax, f"no {split} loss recorded")
    late = [np.array([])]
    for run, colour in ((run, styles[group.name]["color"]) for group in groups for run in group.members):
        steps, loss_N = smoothed(run)
        late += [loss_N[np.array(steps) >= run.facts["steps"] / 5], loss_N[-1:] if not run.has_result else loss_N[:0]]
        _cross_divergence(run, split, ax=ax, colour=colour)
    late_loss = np.concatenate(late)
    if (finite := late_loss[np.isfinite(late_loss)]).size:
        room = 0.05 * np.ptp(finite) or 0.05
        ax.set_ylim(finite.min() - room, finite.max() + room)
    ax.set(title=title)
    return ax


def loss_series(run: Run, split: str) -> Series:
    series = run.series(split, "loss")
    return [step for step, _ in series], np.array([value for _, value in series], dtype=float)


def mean_series(run: Run, name: str) -> Series:
    """A quantity over training, averaged over layers and heads."""
    history = values_over_training(run, name)
    return [step for step, _ in history], np.array([np.mean(value) for _, value in history])


def overload_series(run: Run) -> Series:
    """Nearly uniform heads in percent of all heads of each probe; NaN if a head is not finite."""
    probes = probed_heads(run)
    return [heads.step for heads in probes], np.array([100 * top_quarter_share(heads) for heads in probes])


def _line(ax: Axes, steps: Sequence[int], values: np.ndarray, **style: Any) -> None:
    """Draw about 100 of the points, including the last one."""
    stride = max(1, -(-len(steps) // 100))
    drawn = sorted({*range(0, len(steps), stride), *range(len(steps))[-1:]})
    ax.plot([steps[i] for i in drawn], np.asarray(values)[drawn], **style)


def _cross_divergence(run: Run, split: str, *, ax: Axes, colour: Any) -> None:
    """Mark the first non-finite loss of a run, or its divergence, whose own loss is never logged."""
    bad = [step for step, value in zip(*loss_series(run, split), strict=True) if not np.isfinite(value)]
    if divergence := run.facts.get("divergence"):
        bad.append(divergence["step"])
    if bad:
        ax.plot([min(bad)], [0.97], "x", color=colour, transform=ax.get_xaxis_transform(), clip_on=False)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values; NaN if one of them is not finite."""
    padded = np.concatenate([np.repeat(values[:1], window - 1), values])
    return np.lib.stride_tricks.sliding_window_view(padded, window).mean(axis=1)
