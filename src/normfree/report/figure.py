"""Figures of the page, and the layout that several sections share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from normfree.analysis.groups import Group, is_over
from normfree.report.plots.cells import cells_svg
from normfree.report.plots.heatmaps import HEATMAP_COLOURS, draw_cells, heatmap_size
from normfree.report.plots.style import PANEL_INCHES, Key, Panel, panel_figure, variant_styles
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
        for panel in self.panels:
            yield panel_figure([panel], panel_inches=self.panel_inches)

    def key_part(self) -> Figure | None:
        """The colour bar alone."""
        if self.key is None:
            return None
        return panel_figure([lambda ax: ax], panel_inches=(PANEL_INCHES[0], _KEY_INCHES), key=self.key)


def cells_figure(
    named: Sequence[tuple[str, NDArray[np.float64], Sequence[int]]],
    *,
    limits: tuple[float, float],
    key: Key,
    colours: Colormap = HEATMAP_COLOURS,
    **words: str,
) -> PageFigure:
    """Heatmaps on one scale: titles, values [layers, heads], numbers of the layers. `words`: caption, name, title."""
    scale = {"lowest": limits[0], "highest": limits[1], "colours": colours}
    return PageFigure(
        panels=[partial(draw_cells, v_LH, title=name, numbers=rows, **scale) for name, v_LH, rows in named],
        panel_inches=heatmap_size(*(values_LH.shape for _, values_LH, _ in named)),
        key=key,
        drawings=[
            cells_svg(v_LH, limits=limits, colours=colours, numbers=rows, title=name) for name, v_LH, rows in named
        ],
        **words,
    )


def curve_figure(
    groups: Sequence[Group],
    draw: Callable[..., Any] | Sequence[Callable[..., Any]],
    *,
    shown: Callable[[Run], Any],
    caption: str,
    name: str = "",
    title: str = "",
) -> PageFigure | None:
    """Curves of the groups with a run that `shown` accepts, at most six per panel; None without such a run.

    Each of `draw` is called for every six groups, with these and their `styles`.
    """
    some = [group for group in groups if any(shown(run) for run in group.drawn)]
    styles = variant_styles([group.name for group in groups])
    chunks = [some[start : start + _LINES_PER_PANEL] for start in range(0, len(some), _LINES_PER_PANEL)]
    draws = draw if isinstance(draw, Sequence) else [draw]
    if any(not is_over(run) for group in some for run in group.drawn):
        caption += " An open circle ends the line of an unfinished run."
    panels = [partial(draw, chunk, styles=styles) for chunk in chunks for draw in draws]
    return PageFigure(caption, panels, name, title) if panels else None
