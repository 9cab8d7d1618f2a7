"""Figures of any quantity, drawn from its description: heatmaps, curves over training, profiles over depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from normfree.analysis.entropy import Floats, layer_means
from normfree.analysis.groups import Group
from normfree.analysis.quantities import newest_values, values_over_training
from normfree.report.figure import PageFigure, curve_figure
from normfree.report.plots.curves import LAYER_COLOURS, depth_profile, layer_curves, scalar_curves
from normfree.report.plots.heatmaps import heatmap, heatmap_key, heatmap_size, highest_finite
from normfree.report.plots.style import colour_key
from normfree.store.quantities import Quantity
from normfree.store.runs import Run

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
    unit, scale, mark = quantity.unit, "up to the highest value here", ""
    limit = max(map(highest_finite, shown))
    bounded = [top for top in tops if top is not None and np.isfinite(top).any()]
    if bounded:
        limit = max(map(highest_finite, bounded))
        scale = f"up to the ceiling of {limit:.2f} {unit}".rstrip()
        mark = f" Heads above the mark count as {quantity.mark[1]}." if quantity.mark else ""
        if len({run.spec["data"]["context"] for _, run, _ in measured}) > 1 and isinstance(quantity.ceiling, str):
            limit, unit, scale = 1.0, "share of the ceiling", "as shares of each model's ceiling"
            shown = [
                values_LH if top is None else values_LH / np.atleast_1d(top)[:, None]
                for values_LH, top in zip(shown, tops, strict=True)
            ]
    unfinished = [
        f"{group.name} (step {values_over_training(run, quantity.name)[-1][0]})"
        for group, run, _ in measured
        if run.status != "finished"
    ]
    note = f" Not finished, so from the newest probe: {', '.join(unfinished)}." if unfinished else ""
    panels = []
    for values_LH, (group, run, _) in zip(shown, measured, strict=True):
        layers = run.layer_numbers(quantity.name, len(values_LH))
        panels.append(partial(heatmap, values_LH, ceiling=limit, title=group.name, layers=layers))
    return PageFigure(
        name=f"{quantity.name}-heads",
        title=f"{quantity.title} of every head",
        caption=f"{quantity.meaning} One cell per head, layers downwards, on one colour scale {scale}.{mark} "
        f"{_FIRST_SEED}{note}",
        panels=panels,
        panel_inches=heatmap_size(*(values_LH.shape for values_LH in shown)),
        key=heatmap_key(quantity, limit, unit=unit, marked=bool(bounded)),
    )


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


def _measured(groups: Sequence[Group], quantity: Quantity) -> list[tuple[Group, Run, Floats]]:
    """Each group's run that is drawn, with its newest values."""
    return [
        (group, run, values)
        for group in groups
        if (run := group.shown) is not None and (values := newest_values(run, quantity.name)) is not None
    ]
