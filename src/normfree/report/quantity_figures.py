"""Figures of any quantity, drawn from its description: heatmaps, curves over training, profiles over depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from normfree.analysis.entropy import Floats, layer_means
from normfree.analysis.groups import Group
from normfree.analysis.series import newest_values, values_over_training
from normfree.report.figure import PageFigure, cells_figure, curve_figure
from normfree.report.plots.curves import LAYER_COLOURS, depth_profile, layer_curves, scalar_curves
from normfree.report.plots.heatmaps import DIFFERENCE_COLOURS, HEATMAP_COLOURS, heatmap_key, highest_finite
from normfree.report.plots.style import colour_key
from normfree.report.tables.results import main_pairs
from normfree.store.quantities import Quantity
from normfree.store.runs import Run

_HARDLY = 0.05
_FIRST_SEED = "One seed each: the first finished; otherwise diverged; otherwise unfinished."


def ceilings(run: Run, quantity: Quantity) -> Floats | None:
    """The highest possible value of the quantity in this run, [] or [L]; None if there is none."""
    if isinstance(quantity.ceiling, str):
        return newest_values(run, quantity.ceiling)
    return None if quantity.ceiling is None else np.array(quantity.ceiling)


def _heatmaps(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    measured = _measured(groups, quantity)
    if not measured:
        return None
    shown = [values_LH for _, _, values_LH in measured]
    tops = [ceilings(run, quantity) for _, run, _ in measured]
    scale, mark = "up to the highest value here", ""
    limit, colours = max(map(highest_finite, shown)), HEATMAP_COLOURS
    bounded = [top for top in tops if top is not None and np.isfinite(top).any()]
    key = None
    if bounded:
        limit = max(map(highest_finite, bounded))
        scale = f"up to the ceiling of {limit:.2f} {quantity.unit}".rstrip()
        mark = f" Heads above the mark count as {quantity.mark[1]}." if quantity.mark else ""
        shares = [v / np.atleast_1d(1.0 if top is None else top)[:, None] for v, top in zip(shown, tops, strict=True)]
        if quantity.mark and all((share_LH >= quantity.mark[0]).all() for share_LH in shares):
            shown, colours = [100 * (1 - share_LH) for share_LH in shares], HEATMAP_COLOURS.reversed()
            limit, scale, mark = max(map(highest_finite, shown)), "in percent below the ceiling; all are near it", ""
            key = colour_key(colours, limit=(0, limit), label=f"{quantity.title} (% below the ceiling)")
        elif len({run.spec["data"]["context"] for _, run, _ in measured}) > 1 and isinstance(quantity.ceiling, str):
            shown, limit, scale = shares, 1.0, "as shares of each model's ceiling"
            key = heatmap_key(quantity, limit, unit="share of the ceiling")
    unfinished = [
        f"{group.name} (step {values_over_training(run, quantity.name)[-1][0]})"
        for group, run, _ in measured
        if run.status != "finished"
    ]
    note = f" Not finished, so from the newest probe: {', '.join(unfinished)}." if unfinished else ""
    named = [
        (f"{group.name}{_unchanged(run, quantity)}", values_LH, run.layer_numbers(quantity.name, len(values_LH)))
        for values_LH, (group, run, _) in zip(shown, measured, strict=True)
    ]
    return cells_figure(
        named,
        name=f"{quantity.name}-heads",
        title=f"{quantity.title} of every head",
        caption=f"{quantity.meaning} One cell per head, layers downwards, on one colour scale {scale}.{mark} "
        f"{_FIRST_SEED}{note}",
        limits=(0, limit),
        colours=colours,
        key=key or heatmap_key(quantity, limit, marked=bool(bounded)),
    )


def _means(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    """The mean over the seeds of every group with several."""
    means = _sorted_means(groups, quantity)
    named = [(f"{name}, {seeds} seeds", mean_LH, rows) for name, (seeds, mean_LH, rows) in means.items() if seeds > 1]
    if not named:
        return None
    limit = max(highest_finite(values_LH) for _, values_LH, _ in named)
    return cells_figure(
        named,
        name=f"{quantity.name}-means",
        title=f"{quantity.title}, mean over seeds",
        caption="Finished seeds. Heads have no fixed place in their layer, so each layer is sorted before averaging.",
        limits=(0, limit),
        key=heatmap_key(quantity, limit, marked=False),
    )


def _differences(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    """The difference of the means over seeds for the main pairs."""
    means = _sorted_means(groups, quantity)
    named = []
    for ours, theirs in main_pairs([group for group in groups if group.name in means]):
        (_, our_LH, layers), (_, their_LH, _) = means[ours.name], means[theirs.name]
        if our_LH.shape == their_LH.shape:
            named.append((f"{ours.name} minus {theirs.name}", our_LH - their_LH, layers))
    if not named:
        return None
    limit = max(highest_finite(np.abs(values_LH)) for _, values_LH, _ in named)
    return cells_figure(
        named,
        name=f"{quantity.name}-differences",
        title=f"{quantity.title}, differences",
        caption="Means over finished seeds, each layer sorted, on one scale. Red: higher in the first. Blue: lower.",
        limits=(-limit, limit),
        key=colour_key(DIFFERENCE_COLOURS, limit=(-limit, limit), label=f"difference in {quantity.label.lower()}"),
        colours=DIFFERENCE_COLOURS,
    )


def _sorted_means(groups: Sequence[Group], quantity: Quantity) -> dict[str, tuple[int, Floats, list[int]]]:
    """By group: the number of finished seeds, their mean with each layer sorted, the layers' numbers."""
    means = {}
    for group in groups:
        seeds = [run for run in group.runs if run.kind == "run" and run.status == "finished"]
        values = [np.array(v_LH, dtype=float) for run in seeds if (v_LH := run.last("final", quantity.name))]
        if values and len({values_LH.shape for values_LH in values}) == 1:
            mean_LH = np.mean([-np.sort(-values_LH, axis=1) for values_LH in values], axis=0)
            means[group.name] = (len(values), mean_LH, seeds[0].layer_numbers(quantity.name, len(mean_LH)))
    return means


def _unchanged(run: Run, quantity: Quantity) -> str:
    """`: as before training` if no head moved from its value at step 0 by more than a twentieth of the ceiling."""
    history, top = values_over_training(run, quantity.name), ceilings(run, quantity)
    newest_LH = newest_values(run, quantity.name)
    if newest_LH is None or top is None or run.status != "finished" or not history or history[0][0] != 0:
        return ""
    moved_LH = np.abs(newest_LH - history[0][1]) / np.atleast_1d(top)[:, None]
    return ": as before training" if (moved_LH <= _HARDLY).all() else ""


def _layer_curves(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    shown = [
        (group.name, history, ceilings(group.shown, quantity))
        for group in groups
        if group.shown and len(history := values_over_training(group.shown, quantity.name)) > 1
    ]
    if not shown:
        return None
    layers = max(len(history[-1][1]) for _, history, _ in shown)
    panels = []
    for name, history, ceiling in shown:
        top = None if ceiling is None else highest_finite(ceiling)
        panels.append(partial(layer_curves, history, label=quantity.label, title=name, layers=layers, ceiling=top))
    return PageFigure(
        name=f"{quantity.name}-layers",
        title=f"{quantity.title} of the layers over training",
        caption="One line per layer, coloured by depth. It is the mean over heads, which can hide a single head. "
        f"A dashed line is the ceiling. {_FIRST_SEED}",
        panels=panels,
        key=colour_key(LAYER_COLOURS, limit=(0, max(layers - 1, 1)), label="layer", whole=True),
    )


def _profile(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    profiles = {
        group.name: (run.layer_numbers(quantity.name, len(values)), layer_means(values))
        for group, run, values in _measured(groups, quantity)
    }

    def draw(some: Sequence[Group], **options: Any) -> Axes:
        values = {group.name: profiles[group.name] for group in some}
        return depth_profile(values, label=quantity.label, **options)

    return curve_figure(
        [group for group in groups if group.name in profiles],
        draw,
        shown=lambda _run: True,
        name=f"{quantity.name}-depth",
        title=f"{quantity.title} over the layers",
        caption=f"{quantity.meaning} {_FIRST_SEED}",
    )


def _curves(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    return curve_figure(
        groups,
        partial(scalar_curves, name=quantity.name, label=quantity.label),
        shown=lambda run: len(values_over_training(run, quantity.name)) > 1,
        name=f"{quantity.name}-curves",
        title=f"{quantity.title} over training",
        caption=f"{quantity.meaning} Thin lines are seeds, thick lines their mean.",
    )


FIGURES: dict[tuple[str, ...], tuple[Callable[..., PageFigure | None], ...]] = {
    ("layer", "head"): (_heatmaps, _layer_curves),
    ("layer",): (_profile, _layer_curves),
    (): (_curves,),
}
"""The figures of a quantity, by its axes."""
OPEN_FIGURES = (_heatmaps, _means, _differences)
"""The heatmaps at the top of the page, for quantities of heads that are drawn open."""


def _measured(groups: Sequence[Group], quantity: Quantity) -> list[tuple[Group, Run, Floats]]:
    """Each group's run that is drawn, with its newest values."""
    return [
        (group, run, values)
        for group in groups
        if (run := group.shown) is not None and (values := newest_values(run, quantity.name)) is not None
    ]
