"""Runs and measured models in one call: a plot of their heads, curves over training, a comparison."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from normfree.analysis.groups import group_runs
from normfree.analysis.quantities import newest_values, values_over_training
from normfree.report.plots.curves import scalar_curves
from normfree.report.plots.heatmaps import (
    DIFFERENCE_COLOURS,
    difference_heatmap,
    draw_with_bar,
    heatmap,
    heatmap_key,
    heatmap_size,
    highest_finite,
)
from normfree.report.plots.style import colour_key, current_axes, panel_figure, variant_styles
from normfree.store.quantities import QUANTITIES, Quantity
from normfree.store.runs import Run, find_runs, read_run


def plot_heads(
    model: Any, quantity: str = "entropy_nats", *, minus: Any = None, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Draw a quantity of every head as a heatmap with a colour bar.

    `model` is a run, a run folder or a `Measurement`. With `minus`, another of these, the difference is drawn: red is
    higher in `model`. Draws into `ax`, else into pyplot's current axes, else into a new figure.

    Raises ValueError for a quantity that was not measured for each head, or in other heads.
    """
    described, values_LH, layers, ceiling = _heads(model, quantity)
    size = heatmap_size(values_LH.shape)
    if minus is None:
        limit = highest_finite(values_LH if ceiling is None else np.asarray(ceiling, dtype=float))
        draw = partial(heatmap, values_LH, quantity=described, ceiling=limit, layers=layers, title=title)
        key = heatmap_key(described, limit, marked=ceiling is not None)
        return draw_with_bar(draw, ax=ax, size=size, key=key, label=described.label)
    difference_LH, label = values_LH - _same_heads(minus, quantity, values_LH), f"Difference: {described.label}"
    limit = highest_finite(np.abs(difference_LH))
    draw = partial(difference_heatmap, difference_LH, limit=limit, layers=layers, title=title)
    key = colour_key(DIFFERENCE_COLOURS, limit=(-limit, limit), label=label)
    return draw_with_bar(draw, ax=ax, size=size, key=key, label=label)


def plot_curves(*runs: Run | Path | str, quantity: str = "loss", ax: Axes | None = None) -> Axes:
    """Draw a quantity over training: the mean of each variant, and a thin line per seed.

    `runs` are runs, run folders or folders of runs. A quantity of layers or heads is averaged over them. `loss` and
    `perplexity` are those of the held-out text. Draws into `ax`, else into pyplot's current axes, else a new figure.

    Raises ValueError for a quantity that no run recorded.
    """
    places = [run.folder if isinstance(run, Run) else run for run in runs]
    groups = group_runs(find_runs(places), mix=True)
    recorded = {name: known for group in groups for run in group.drawn for name, known in run.quantities.items()}
    if not any(values_over_training(run, quantity) for group in groups for run in group.drawn):
        raise ValueError(f"{quantity!r} was not recorded over training; there are: {', '.join(recorded)}")
    styles = variant_styles([group.name for group in groups])
    draw = partial(scalar_curves, groups, quantity, label=recorded[quantity].label, styles=styles)
    ax = ax or current_axes()
    if ax is None:
        return panel_figure([draw]).axes[0]
    draw(ax=ax).legend()
    return ax


def compare(first: Any, second: Any, quantity: str = "entropy_nats") -> pd.DataFrame:
    """Compare every head of two models: a row a head, those that differ most first.

    `first` and `second` are runs, run folders or `Measurement`s. Raises ValueError for a quantity that was not measured
    for each head, or in other heads.
    """
    _, values_LH, layers, _ = _heads(first, quantity)
    index = pd.MultiIndex.from_product([layers, range(values_LH.shape[1])], names=["layer", "head"])
    others_LH = _same_heads(second, quantity, values_LH)
    frame = pd.DataFrame({"first": values_LH.ravel(), "second": others_LH.ravel()}, index=index).reset_index()
    frame["difference"] = frame["first"] - frame["second"]
    return frame.sort_values("difference", key=abs, ascending=False, ignore_index=True)


def _heads(model: Any, name: str) -> tuple[Quantity, np.ndarray, list[int], Any]:
    """The description of a quantity, its values [L, H], the numbers of its layers, and its ceiling or None."""
    if isinstance(model, (str, Path)):
        model = read_run(model)
    if isinstance(model, Run):
        quantities = model.quantities
        values = {each: newest for each in quantities if (newest := newest_values(model, each)) is not None}
        layers = {each: model.layer_numbers(each, len(value)) for each, value in values.items() if value.ndim}
    else:
        quantities, values, layers = QUANTITIES, model.values, model.layers
    per_head = [each for each, value in values.items() if value.ndim == 2]
    if name not in per_head:
        raise ValueError(f"{name!r} was not measured for each head; there are: {', '.join(per_head) or 'none'}")
    ceiling = quantities[name].ceiling
    return quantities[name], values[name], layers[name], values.get(ceiling) if isinstance(ceiling, str) else ceiling


def _same_heads(model: Any, name: str, like_LH: np.ndarray) -> np.ndarray:
    values_LH = _heads(model, name)[1]
    if values_LH.shape != like_LH.shape:
        raise ValueError(f"the models have other heads: [layers, heads] are {like_LH.shape} and {values_LH.shape}")
    return values_LH
