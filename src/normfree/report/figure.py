"""Figures of the page, and the layout that several sections share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from normfree.analysis.groups import Group
from normfree.report.plots.curves import Series, seed_curves
from normfree.report.plots.heatmaps import (
    DIFFERENCE_COLOURS,
    HEATMAP_COLOURS,
    Heatmap,
    draw_heatmap,
    heatmap_size,
    heatmap_svg,
    highest_finite,
)
from normfree.report.plots.style import PANEL_INCHES, Key, Panel, colour_key, panel_figure, variant_styles
from normfree.store.runs import Run

_LINES_PER_PANEL = 6
_KEY_INCHES = 0.75


@dataclass(frozen=True)
class PageFigure:
    """Panels that belong together: side by side on the page, one grid in the files."""

    caption: str
    panels: Sequence[Panel]
    name: str = ""
    """Unless given, the section's, as is the title."""
    title: str = ""
    panel_inches: tuple[float, float] = PANEL_INCHES
    key: Key | None = None
    drawings: Sequence[Markup] = ()
    """Hand-written panels for the page, instead of drawn ones."""

    def whole(self) -> Figure:
        """All panels and the colour bar in one figure."""
        return panel_figure(self.panels, panel_inches=self.panel_inches, key=self.key)

    def parts(self) -> Iterator[Figure]:
        """One figure per panel."""
        return (panel_figure([panel], panel_inches=self.panel_inches) for panel in self.panels)

    def key_part(self) -> Figure | None:
        """The colour bar alone."""
        size = (PANEL_INCHES[0], _KEY_INCHES)
        return panel_figure([lambda ax: ax], panel_inches=size, key=self.key) if self.key else None


def heatmap_figure(
    titled: Sequence[tuple[str, np.ndarray, Sequence[int]]],
    *,
    label: str,
    limit: float | None = None,
    mark: tuple[float, str] | None = None,
    colours: str = HEATMAP_COLOURS,
    **words: str,
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
        panels=[partial(draw_heatmap, drawing) for drawing in drawings],
        panel_inches=heatmap_size(drawings),
        key=colour_key(colours, limit=limits, label=label, mark=edge),
        drawings=[heatmap_svg(drawing) for drawing in drawings],
        **words,
    )


def curve_figure(
    groups: Sequence[Group], draws: Sequence[Callable[..., Any]], *, has_line: Callable[[Run], Any], **words: str
) -> PageFigure | None:
    """Curves of the groups with a run that has a line, at most six per panel; None without such a run.

    Each of `draws` is called for every six groups, with these and the `styles` of all. `words`: caption, name, title.
    """
    styles = variant_styles([group.name for group in groups])
    groups = [group for group in groups if any(has_line(run) for run in group.curve_runs)]
    sixes = [groups[start : start + _LINES_PER_PANEL] for start in range(0, len(groups), _LINES_PER_PANEL)]
    if any(not run.has_result for group in groups for run in group.curve_runs):
        words["caption"] += " An open circle ends the line of an unfinished run."
    panels = [partial(draw, six, styles=styles) for six in sixes for draw in draws]
    return PageFigure(panels=panels, **words) if panels else None


def seed_figure(
    groups: Sequence[Group], series: Callable[[Run], Series], *, label: str, **words: str
) -> PageFigure | None:
    """A number over training, with a line per seed. None for runs that recorded it less than twice."""
    draw = partial(seed_curves, series=series, label=label)
    return curve_figure(groups, [draw], has_line=lambda run: len(series(run)[0]) > 1, **words)
