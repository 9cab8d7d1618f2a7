"""Figures of the page: their layout, and heatmaps, curves and profiles drawn from a quantity's description."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from normfree.analysis import entropy
from normfree.analysis.entropy import Floats, group_and_number, newest_values, values_over_training
from normfree.analysis.groups import Group
from normfree.analysis.pairs import Pair, main_pairs
from normfree.analysis.verdicts import slope_layers
from normfree.report.plots.curves import LAYER_COLOURS, Series, depth_profile, layer_curves, mean_series, seed_curves
from normfree.report.plots.heatmaps import DIFFERENCE_COLOURS, HEATMAP_COLOURS, Heatmap, heatmap_size, highest_finite
from normfree.report.plots.style import PANEL_INCHES, Key, Panel, colour_key, panel_figure, variant_styles
from normfree.store.quantities import Quantity
from normfree.store.runs import Run

_HARDLY = 0.05


@dataclass(frozen=True)
class PageFigure:
    """Panels that belong together: side by side on the page, one grid in the files."""

    caption: str
    panels: Sequence[Panel]
    name: str = ""  # unless given, the section's, as is the title
    title: str = ""
    panel_inches: tuple[float, float] = PANEL_INCHES
    key: Key | None = None
    drawings: Sequence[Markup] = ()  # hand-written panels for the page, instead of drawn ones

    def whole(self) -> Figure:
        """All panels and the colour bar in one figure."""
        return panel_figure(self.panels, panel_inches=self.panel_inches, key=self.key)

    def parts(self) -> Iterator[Figure]:
        """One figure per panel."""
        return (panel_figure([panel], panel_inches=self.panel_inches) for panel in self.panels)

    def key_part(self) -> Figure | None:
        """The colour bar alone."""
        return panel_figure([lambda ax: ax], panel_inches=(PANEL_INCHES[0], 0.75), key=self.key) if self.key else None


def heatmap_figure(
    titled: Sequence[tuple[str, np.ndarray, Sequence[int | str]]],
    *,
    label: str,
    limit: float | None = None,
    mark: tuple[float, str] | None = None,
    colours: str = HEATMAP_COLOURS,
    **words: Any,
) -> PageFigure | None:
    """Heatmaps (title, values [layers, heads], layers' numbers) on one scale, by default up to the highest value.

    `label` is that of the colour bar, `mark` a share of the limit with its meaning. `words`: caption, name, title.
    """
    if not titled:
        return None
    limit = limit or max(highest_finite(np.abs(values_LH)) for _, values_LH, _ in titled)
    limits = (-limit if colours == DIFFERENCE_COLOURS else 0.0, limit)
    drawings = [Heatmap(title, values_LH, layers, limits, colours) for title, values_LH, layers in titled]
    edge = (mark[0] * limit, f"{mark[1]} from {mark[0] * limit:.2f}") if mark else None
    return PageFigure(
        panels=[drawing.draw for drawing in drawings],
        panel_inches=heatmap_size(drawings),
        key=colour_key(colours, limit=limits, label=label, mark=edge),
        drawings=[drawing.svg() for drawing in drawings],
        **words,
    )


def seed_figure(
    groups: Sequence[Group], series: Callable[[Run], Series], *, draws: Sequence[Callable[..., Any]], **words: Any
) -> PageFigure | None:
    """Curves of the groups with a run that has the series, at most six groups per panel; None without such a run.

    Each of `draws` is called for every six groups, with these and the `styles` of all. `words`: caption, name, title.
    """
    styles = variant_styles([group.name for group in groups])
    groups = [group for group in groups if any(series(run)[0] for run in group.members)]
    sixes = [groups[start : start + 6] for start in range(0, len(groups), 6)]
    if any(not run.has_result for group in groups for run in group.members):
        words["caption"] += " An open circle ends the line of an unfinished run."
    panels = [partial(draw, six, styles=styles) for six in sixes for draw in draws]
    return PageFigure(panels=panels, **words) if panels else None


def heatmaps(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    """The heads of one run of each group, on one scale."""
    measured = _measured(groups, quantity)
    values = [values_LH for *_, values_LH, _ in measured]
    tops = [_ceiling(run, quantity) for _, run, *_ in measured]
    bounded = [top for top in tops if top is not None and np.isfinite(top).any()]
    scale, label, limit, mark, colours = "up to the highest value here", quantity.label, None, None, HEATMAP_COLOURS
    if bounded:
        shares = [v / np.atleast_1d(1.0 if top is None else top)[:, None] for v, top in zip(values, tops, strict=True)]
        limit, mark = max(map(highest_finite, bounded)), quantity.mark
        scale = f"up to the ceiling of {limit:.2f} {quantity.unit}".rstrip()
        if mark and all((share_LH >= mark[0]).all() for share_LH in shares):
            values, limit, mark = [100 * (1 - share_LH) for share_LH in shares], None, None
            colours = f"{HEATMAP_COLOURS}_r"
            scale, label = "in percent below the ceiling; all are near it", f"{quantity.title} (% below the ceiling)"
        elif isinstance(quantity.ceiling, str) and (
            len({run.spec["data"]["context"] for _, run, *_ in measured}) > 1
            or limit > 1.01 * min(float(np.nanmin(top)) for top in bounded)
        ):
            values, limit = shares, 1.0
            scale, label = "as shares of each layer's ceiling", f"{quantity.title} (share of the ceiling)"
    unfinished = ", ".join(
        f"{group.name} (step {values_over_training(run, quantity.name)[-1][0]})"
        for group, run, *_ in measured
        if run.status != "finished"
    )
    titles = [group.name + _unchanged(run, quantity) for group, run, *_ in measured]
    return heatmap_figure(
        list(zip(titles, values, [layers for *_, layers in measured], strict=True)),
        label=label,
        limit=limit,
        mark=mark,
        colours=colours,
        name=f"{quantity.name}-heads",
        title=f"{quantity.title} of every head",
        caption=f"{quantity.meaning} One cell per head, layers downwards, on one colour scale {scale}."
        f"{f' Heads above the mark count as {mark[1]}.' if mark else ''}"
        f"{f' Not finished, so from the newest probe: {unfinished}.' if unfinished else ''}",
    )


def means(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    """The mean over the seeds of every group with several."""
    of_group = _sorted_means(groups, quantity).items()
    return heatmap_figure(
        [(f"{name}, {seeds} seeds", mean_LH, layers) for name, (seeds, mean_LH, layers) in of_group if seeds > 1],
        label=quantity.label,
        name=f"{quantity.name}-means",
        title=f"{quantity.title}, mean over seeds",
        caption="Finished seeds. Heads have no fixed place in their layer, so each layer is sorted before averaging.",
    )


def differences(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    """The means of the main pairs of variants, or two measured models head by head: the first minus the second."""
    values, caption = _sorted_means(groups, quantity), "Means over finished seeds, each layer sorted, on one scale. "
    pairs = main_pairs([group for group in groups if group.name in values])
    if len(groups) == 2 and not any(group.is_trained for group in groups):
        caption, pairs = "", [Pair(*groups)]
        values = {group.name: (1, values_LH, layers) for group, _, values_LH, layers in _measured(groups, quantity)}
    titled = []
    for ours, theirs in ((pair.ours.name, pair.theirs.name) for pair in pairs):
        if {ours, theirs} <= values.keys() and values[ours][1].shape == values[theirs][1].shape:
            titled.append((f"{ours} minus {theirs}", values[ours][1] - values[theirs][1], values[ours][2]))
    return heatmap_figure(
        titled,
        label=f"difference in {quantity.label.lower()}",
        colours=DIFFERENCE_COLOURS,
        name=f"{quantity.name}-differences",
        title=f"{quantity.title}, differences",
        caption=f"{caption}Red: higher in the first. Blue: lower.",
    )


def layers_over_training(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    """The layers of one run of each group over training."""
    panels, has_ceiling = [], False
    measured = _measured(groups, quantity)
    deepest = max((group_and_number(layer)[1] for *_, layers in measured for layer in layers), default=0)
    for group, run, _, layers in measured:
        if len(history := values_over_training(run, quantity.name)) > 1:
            top = _ceiling(run, quantity)
            for heads, (places, numbers) in _by_group(layers).items():
                ceiling = None if top is None else highest_finite(top[places] if top.ndim else top)
                has_ceiling |= ceiling is not None
                words = {"title": f"{group.name}{heads and f', {heads}'}", "label": quantity.label, "ceiling": ceiling}
                part = [(step, values[places]) for step, values in history]
                panels.append(partial(layer_curves, part, numbers=numbers, deepest=deepest, **words))
    figure = PageFigure(
        name=f"{quantity.name}-layers",
        title=f"{quantity.title} of the layers over training",
        caption="One line per layer, coloured by depth, from measurement to measurement."
        f"{' It is the mean over heads, which can hide a single head.' if 'head' in quantity.axes else ''}"
        f"{' A dashed line is the ceiling.' if has_ceiling else ''}",
        panels=panels,
        key=colour_key(LAYER_COLOURS, limit=(0, max(deepest, 1)), label="layer", whole=True),
    )
    return figure if panels else None


def profile(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    """The newest values of one run of each group over the layers."""
    profiles: dict[str, tuple[list[int], Floats]] = {}
    for group, _, values, layers in _measured(groups, quantity):
        for heads, (places, numbers) in _by_group(layers).items():
            profiles[f"{group.name}{heads and f', {heads}'}"] = (numbers, entropy.layer_means(values)[places])
    names = [group.name for group in groups]
    styles = variant_styles(names if {*profiles} <= {*names} else list(profiles))
    figure = PageFigure(
        panels=[partial(depth_profile, profiles, label=quantity.label, styles=styles)],
        name=f"{quantity.name}-depth",
        title=f"{quantity.title} over the layers",
        caption=quantity.meaning,
    )
    return figure if profiles else None


def curves(groups: Sequence[Group], quantity: Quantity) -> PageFigure | None:
    """The quantity over training, averaged over layers and heads."""
    series = partial(mean_series, name=quantity.name)
    return seed_figure(
        groups,
        series,
        draws=[partial(seed_curves, series=series, label=quantity.label)],
        name=f"{quantity.name}-curves",
        title=f"{quantity.title} over training",
        caption=quantity.meaning,
    )


FIGURES: dict[tuple[str, ...], tuple[Callable[..., PageFigure | None], ...]] = {
    ("layer", "head"): (heatmaps, means, differences, layers_over_training),
    ("layer",): (profile, layers_over_training),
    (): (curves,),
}


def _by_group(layers: Sequence[int | str]) -> Mapping[str, tuple[list[int] | slice, list[int]]]:
    """Places and numbers of the layers of each group of heads; of unnumbered layers all places."""
    of_layer = [group_and_number(layer) for layer in layers]
    places = {heads: [place for place, (name, _) in enumerate(of_layer) if name == heads] for heads, _ in of_layer}
    parts = {heads: (part, [of_layer[place][1] for place in part]) for heads, part in places.items()}
    return parts or {"": (slice(None), [])}


def _measured(groups: Sequence[Group], quantity: Quantity) -> list[tuple[Group, Run, Floats, list[int | str]]]:
    """Each group's run that is drawn, with its newest values and the layers' numbers."""
    measured = []
    for group in groups:
        run = group.heatmap_run
        if (values := newest_values(run, quantity.name)) is not None:
            layers = run.layer_numbers(quantity.name, len(values))
            heads = entropy.final_heads(run)
            if heads is not None and heads.existing.shape == values.shape and not heads.existing.all():
                values = np.ma.array(values, mask=~heads.existing)  # layers may differ in heads
            measured.append((group, run, values, slope_layers(run) if quantity.name == "negative_slope" else layers))
    return measured


def _sorted_means(groups: Sequence[Group], quantity: Quantity) -> dict[str, tuple[int, Floats, list[int | str]]]:
    """By group: the number of finished seeds, their mean with each layer sorted, the layers' numbers."""
    of_group = {}
    for group in groups if quantity.drawn == "open" else ():  # the page stays small without folded ones
        seeds = [run for run in group.runs if group.is_trained and run.status == "finished"]
        values = [np.array(v_LH, dtype=float) for run in seeds if (v_LH := run.last("final", quantity.name))]
        if values and len({values_LH.shape for values_LH in values}) == 1:
            mean_LH = np.mean([-np.sort(-values_LH, axis=1) for values_LH in values], axis=0)
            of_group[group.name] = (len(values), mean_LH, seeds[0].layer_numbers(quantity.name, len(mean_LH)))
    return of_group


def _ceiling(run: Run, quantity: Quantity) -> Floats | None:
    """The highest possible value of the quantity in this run, [] or [L]; None if there is none."""
    if isinstance(quantity.ceiling, str):
        return newest_values(run, quantity.ceiling)
    return None if quantity.ceiling is None else np.array(quantity.ceiling)


def _unchanged(run: Run, quantity: Quantity) -> str:
    """`: as before training` if no head moved from its value at step 0 by more than a twentieth of the ceiling."""
    history, top = values_over_training(run, quantity.name), _ceiling(run, quantity)
    newest_LH = newest_values(run, quantity.name)
    if newest_LH is None or top is None or run.status != "finished" or not history or history[0][0] != 0:
        return ""
    moved_LH = np.abs(newest_LH - history[0][1]) / np.atleast_1d(top)[:, None]
    return ": as before training" if (moved_LH <= _HARDLY).all() else ""
