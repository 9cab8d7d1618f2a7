"""Figures of any quantity, drawn from its description: heatmaps, curves over training, profiles over depth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from normfree.analysis.entropy import layer_means
from normfree.analysis.groups import Group
from normfree.analysis.quantities import Floats, newest_values, values_over_training
from normfree.report import plots
from normfree.report.figure import PageFigure, chunks_of, largest, open_ends
from normfree.report.plots.heatmaps import highest_finite
from normfree.store.quantities import Quantity
from normfree.store.runs import Run

_FIRST_SEED = (
    "First finished seed of each variant; where none finished, the first that diverged, else an unfinished one."
)


def quantity_figures(groups: Sequence[Group], quantity: Quantity) -> list[PageFigure]:
    """Every figure of a quantity that these runs can give."""
    if quantity.axes == ("layer", "head"):
        figures = [_heatmaps(groups, quantity), _layer_curves(groups, quantity)]
    elif quantity.axes == ("layer",):
        figures = [_profile(groups, quantity), _layer_curves(groups, quantity)]
    else:
        figures = [_curves(groups, quantity)]
    return [figure for figure in figures if figure is not None]


def ceilings(run: Run, quantity: Quantity) -> Floats | None:
    """The highest value that the quantity can have in this run, [] or [L]; None where there is none."""
    if isinstance(quantity.ceiling, str):
        return newest_values(run, quantity.ceiling)
    return None if quantity.ceiling is None else np.array(quantity.ceiling)


def _heatmaps(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    measured = _measured(groups, quantity)
    if not measured:
        return None
    shown = [values_LH for _, _, values_LH in measured]
    tops = [ceilings(run, quantity) for _, run, _ in measured]
    unit, scale = quantity.unit, "up to the highest value here"
    limit = max(map(highest_finite, shown))
    bounded = [top for top in tops if top is not None and np.isfinite(top).any()]
    if bounded:
        limit = max(map(highest_finite, bounded))
        scale = f"up to the ceiling of {limit:.2f} {unit}".rstrip()
        if len({run.spec["data"]["context"] for _, run, _ in measured}) > 1 and isinstance(quantity.ceiling, str):
            limit, unit, scale = 1.0, "share of the ceiling", "in shares of each one's ceiling"
            shown = [
                values_LH if top is None else values_LH / np.atleast_1d(top)[:, None]
                for values_LH, top in zip(shown, tops, strict=True)
            ]
    mark = f" From the mark on a head counts as {quantity.mark[1]}." if quantity.mark and bounded else ""
    unfinished = [
        f"{group.name} (step {_step(run, quantity)})" for group, run, _ in measured if run.status != "finished"
    ]
    note = f" Newest probe, for want of a final measurement: {', '.join(unfinished)}." if unfinished else ""
    return PageFigure(
        name=f"{quantity.name}-heads",
        title=f"{quantity.title} of every head",
        caption=f"{quantity.meaning} One cell a head, layers downwards; one colour scale, {scale}.{mark} "
        f"{_FIRST_SEED}{note}",
        panels=tuple(
            partial(
                plots.heatmap,
                values_LH,
                ceiling=limit,
                title=group.name,
                layers=run.layer_numbers(quantity.name, len(values_LH)),
            )
            for values_LH, (group, run, _) in zip(shown, measured, strict=True)
        ),
        panel_inches=largest([values_LH.shape for values_LH in shown]),
        key=plots.heatmap_key(quantity, limit, unit=unit, marked=bool(bounded)),
    )


def _layer_curves(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    shown = [
        (group, history)
        for group in groups
        if group.shown and len(history := values_over_training(group.shown, quantity.name)) > 1
    ]
    if not shown:
        return None
    layers = max(len(history[-1][1]) for _, history in shown)
    tops = {group.name: None if group.shown is None else ceilings(group.shown, quantity) for group, _ in shown}
    return PageFigure(
        name=f"{quantity.name}-layers",
        title=f"{quantity.title} of the layers over training",
        caption="One line a layer, coloured by its depth; over heads the mean, in which a single head can hide. "
        f"A dashed line is the ceiling. {_FIRST_SEED}",
        panels=tuple(
            partial(
                plots.layer_curves,
                history,
                label=quantity.label,
                title=group.name,
                layers=layers,
                ceiling=None if (top := tops[group.name]) is None else highest_finite(top),
            )
            for group, history in shown
        ),
        key=plots.colour_key(plots.LAYER_COLOURS, limit=(0, max(layers - 1, 1)), label="layer", whole=True),
    )


def _profile(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    measured = {group.name: (group, run, values) for group, run, values in _measured(groups, quantity)}
    if not measured:
        return None
    styles = plots.variant_styles([group.name for group in groups])
    chunks = chunks_of([group for group, _, _ in measured.values()])
    profiles = [
        {
            name: (run.layer_numbers(quantity.name, len(values)), layer_means(values))
            for name, (_, run, values) in measured.items()
            if name in {group.name for group in chunk}
        }
        for chunk in chunks
    ]
    return PageFigure(
        name=f"{quantity.name}-depth",
        title=f"{quantity.title} over the layers",
        caption=f"{quantity.meaning} {_FIRST_SEED}",
        panels=tuple(partial(plots.depth_profile, p, label=quantity.label, styles=styles) for p in profiles),
        panel_inches=plots.curves_size(chunks),
    )


def _curves(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    chunks = chunks_of([g for g in groups if any(len(values_over_training(run, quantity.name)) > 1 for run in g.drawn)])
    if not chunks:
        return None
    styles = plots.variant_styles([group.name for group in groups])
    return PageFigure(
        name=f"{quantity.name}-curves",
        title=f"{quantity.title} over training",
        caption=f"{quantity.meaning} A thin line is a seed, the other its variant's mean.{open_ends(groups)}",
        panels=tuple(
            partial(plots.scalar_curves, chunk, quantity.name, label=quantity.label, styles=styles) for chunk in chunks
        ),
        panel_inches=plots.curves_size(chunks),
    )


def _measured(groups: Sequence[Group], quantity: Quantity) -> list[tuple[Group, Run, Floats]]:
    """The run that is drawn of each group, with its newest values."""
    return [
        (group, run, values)
        for group in groups
        if (run := group.shown) is not None and (values := newest_values(run, quantity.name)) is not None
    ]


def _step(run: Run, quantity: Quantity) -> int:
    return values_over_training(run, quantity.name)[-1][0]
