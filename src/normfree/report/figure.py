"""Figures of the page, and the layout that several sections share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from normfree.analysis.groups import Group, is_over
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
