"""Plots and comparisons in one call. A model is a run, its folder or a `Measurement`."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from normfree.analysis.entropy import newest_values, values_over_training
from normfree.analysis.groups import all_runs, group_runs
from normfree.report.plots.curves import mean_series, seed_curves
from normfree.report.plots.heatmaps import DIFFERENCE_COLOURS, Heatmap, draw_with_bar, highest_finite
from normfree.report.plots.style import PANEL_INCHES, axes_to_draw_in, variant_styles
from normfree.store.quantities import QUANTITIES, Quantity
from normfree.store.runs import RunFolder, find_runs, read_run


def plot_heads(
    model: Any, quantity: str = "entropy_nats", *, minus: Any = None, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Draw a heatmap with a colour bar, or with `minus`, another model, the difference: red is higher in `model`.

    It goes into `ax`, else into pyplot's current axes, else into a new figure. Raises ValueError for a quantity that
    was not measured for each head.
    """
    described, values_LH, layers, ceiling = _heads(model, quantity)
    if minus is None:
        scale = values_LH if ceiling is None else np.asarray(ceiling)
        return draw_with_bar(Heatmap(title, values_LH, layers, (0, highest_finite(scale))), described.label, ax)
    table = compare(model, minus, quantity).pivot(index="layer", columns="head", values="difference").loc[layers]
    limit = highest_finite(table.abs().to_numpy())
    drawing = Heatmap(title, table.to_numpy(), layers, (-limit, limit), DIFFERENCE_COLOURS)
    return draw_with_bar(drawing, f"Difference: {described.label}", ax)


def plot_curves(*runs: RunFolder, quantity: str = "loss", ax: Axes | None = None) -> Axes:
    """Draw a quantity over training: the mean of each variant, and a thin line per seed.

    Layers and heads are averaged; `loss` and `perplexity` are of held-out text. `runs` are also folders of runs. Draws
    where `plot_heads` does. Raises ValueError for a quantity that no run recorded.
    """
    groups = group_runs(find_runs(runs), mix=True)
    recorded = {name: each for run in all_runs(groups) for name, each in run.quantities.items()}
    series = partial(mean_series, name=quantity)
    if not any(series(run)[0] for run in all_runs(groups)):
        names = [name for name in recorded if any(values_over_training(run, name) for run in all_runs(groups))]
        raise ValueError(f"{quantity!r} was not recorded over training; there are: {', '.join(names)}")
    styles, ax = variant_styles([group.name for group in groups]), ax or axes_to_draw_in(PANEL_INCHES)
    seed_curves(groups, series, label=recorded[quantity].label, styles=styles, ax=ax).legend()
    return ax


def compare(first: Any, second: Any, quantity: str = "entropy_nats") -> pd.DataFrame:
    """Compare two models: one row a head, those that differ most first.

    Raises ValueError for a quantity that was not measured for each head, or for other heads.
    """
    (_, first_LH, layers, _), (_, second_LH, *_) = _heads(first, quantity), _heads(second, quantity)
    if first_LH.shape != second_LH.shape:
        raise ValueError(f"the models differ in [layers, heads]: {first_LH.shape} and {second_LH.shape}")
    index = pd.MultiIndex.from_product([layers, range(first_LH.shape[1])], names=["layer", "head"])
    frame = pd.DataFrame({"first": first_LH.ravel(), "second": second_LH.ravel()}, index=index).reset_index()
    frame["difference"] = frame["first"] - frame["second"]
    return frame.sort_values("difference", key=abs, ascending=False, ignore_index=True, kind="stable")


def _heads(model: Any, name: str) -> tuple[Quantity, np.ndarray, list[int | str], Any]:
    """A quantity, its values [L, H], the numbers of its layers, and its ceiling or None."""
    if hasattr(model, "values"):
        quantities, values, layers = QUANTITIES, model.values, model.layers
    else:
        run = read_run(model)
        quantities = run.quantities
        values = {each: newest for each in quantities if (newest := newest_values(run, each)) is not None}
        layers = {each: run.layer_numbers(each, len(value)) for each, value in values.items() if value.ndim}
    per_head = [each for each, value in values.items() if value.ndim == 2]
    if name not in per_head:
        raise ValueError(f"{name!r} was not measured for each head; there are: {', '.join(per_head) or 'none'}")
    ceiling = quantities[name].ceiling
    return quantities[name], values[name], layers[name], values.get(ceiling) if isinstance(ceiling, str) else ceiling
