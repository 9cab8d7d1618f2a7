"""A figure of the page, and what several sections need to lay one out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from normfree.analysis.groups import Group, is_over
from normfree.report import plots

_LINES_PER_PANEL = 6
_KEY_INCHES = 0.75


@dataclass(frozen=True)
class PageFigure:
    """Panels that belong together: flowing side by side on the page, one grid in the files."""

    name: str
    title: str
    caption: str
    panels: tuple[plots.Panel, ...]
    panel_inches: tuple[float, float] = (3.9, 2.9)
    columns: int = 2
    key: plots.Key | None = None

    def whole(self) -> Figure:
        """All panels and the colour bar in one figure."""
        return plots.panel_figure(self.panels, columns=self.columns, panel_inches=self.panel_inches, key=self.key)

    def parts(self) -> Iterator[Figure]:
        """One figure a panel."""
        for panel in self.panels:
            yield plots.panel_figure([panel], panel_inches=self.panel_inches)

    def key_part(self) -> Figure | None:
        """The colour bar alone."""
        if self.key is None:
            return None
        return plots.panel_figure([lambda ax: ax], panel_inches=(3.9, _KEY_INCHES), key=self.key)


def largest(shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """Inches of a panel that holds a heatmap of each of these shapes."""
    return plots.heatmap_size(max(shape[0] for shape in shapes), max(shape[1] for shape in shapes))


def chunks_of(groups: Sequence[Group]) -> list[list[Group]]:
    """Few enough lines for one pair of axes; those of one label stay together where they fit."""
    chunks: list[list[Group]] = []
    for label in dict.fromkeys(group.label for group in groups):
        alike = [group for group in groups if group.label == label]
        size = math.ceil(len(alike) / math.ceil(len(alike) / _LINES_PER_PANEL))  # 7 are 4 and 3, not 6 and 1
        for piece in (alike[i : i + size] for i in range(0, len(alike), size)):
            if not chunks or len(chunks[-1]) + len(piece) > _LINES_PER_PANEL:
                chunks.append([])
            chunks[-1] += piece
    return chunks


def open_ends(groups: Sequence[Group]) -> str:
    """A sentence for captions, where there is something to explain."""
    some = any(not is_over(run) for group in groups for run in group.drawn)
    return " An open circle ends the line of a run that is not finished." if some else ""
