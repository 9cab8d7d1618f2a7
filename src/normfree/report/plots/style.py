"""How every figure looks: colours that colour-blind readers can tell apart (a test holds them to it), sizes that a
phone can show.

Figures are built as objects, without pyplot, so that no state outlives a call.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

Panel = Callable[..., Any]
"""Draws itself into the Axes it is given as `ax`."""
Key = Callable[[Figure, list[Axes]], Any]
"""Draws what all panels of a figure share."""
Styles = Mapping[str, Mapping[str, Any]]
"""Colour and dash of each variant's line, by its name."""

COLOURS = {
    "ink": ("#1b2027", "#e6e9ee"),
    "muted": ("#5b6470", "#a2acb9"),
    "grid": ("#d5dae1", "#343d49"),
    "blue": ("#2d82fa", "#4990fd"),
    "sky": ("#1f9cc6", "#63defe"),
    "orange": ("#ea7006", "#e87025"),
    "green": ("#328665", "#37cb90"),
    "purple": ("#820da0", "#ca77a1"),
    "gold": ("#624805", "#ffab01"),
    "violet": ("#6110e9", "#9588ce"),
    "olive": ("#839b57", "#cbdf72"),
    "grey": ("#454955", "#dcdddc"),
    "red": ("#b23a48", "#ff8794"),
}
"""Each colour on white, as files have it, and on the dark ground of the page. Red is for what is not finite."""
_ON_WHITE = {name: on_white for name, (on_white, _) in COLOURS.items()}
INK, MUTED, GRID, GREEN, RED = (_ON_WHITE[name] for name in ("ink", "muted", "grid", "green", "red"))
# Blues have LayerNorm, orange and green have none; in grey the dash alone tells them apart.
_VARIANTS = {
    "SM+LN+G": {"color": _ON_WHITE["blue"], "linestyle": "--"},
    "SM+LN+R": {"color": _ON_WHITE["sky"], "linestyle": "-."},
    "SM+G": {"color": _ON_WHITE["orange"], "linestyle": "-"},
    "SM+R": {"color": GREEN, "linestyle": (0, (8, 1.5))},
}
_OTHERS = tuple(_ON_WHITE[name] for name in ("purple", "gold", "violet", "olive", "grey"))
_KEY_INCHES = 0.3
LEGEND_LETTERS = 22

RC: dict[Any, Any] = {
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.hinting": "no_hinting",  # text is as wide in a file as it was when the figure was laid out
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a tag may have dollar signs
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.6,
}


def drawing_settings(**more: Any) -> AbstractContextManager[None]:
    """Only our settings, whatever the user's matplotlibrc or script has set; theirs come back afterwards."""
    return style.context(["default", RC, more])


def variant_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Line colour and dash of each name. The paper's four variants always look the same."""
    free = itertools.cycle(
        {"color": colour, "linestyle": dash} for dash in ("-", "--", "-.", ":") for colour in _OTHERS
    )
    return {name: _VARIANTS.get(name) or next(free) for name in names}


def panel_figure(
    panels: Sequence[Panel],
    *,
    columns: int = 2,
    panel_inches: tuple[float, float] = (3.9, 2.9),
    key: Key | None = None,
) -> Figure:
    """Panels side by side in one figure, with one legend below for what they label; `key` may add a colour bar that all
    of them share."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = panel_inches
    with drawing_settings():
        figure = Figure(figsize=(columns * width, rows * height))
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for ax, panel in zip(grid, panels, strict=False):
            panel(ax=ax)
        for ax in grid[len(panels) :]:
            ax.set_axis_off()
        if key is not None:
            key(figure, grid)
        _add_legend(figure, grid)
        # Run once here: a figure that keeps its layout engine is drawn twice by every savefig.
        ConstrainedLayoutEngine().execute(figure)
    return figure


def colour_key(
    colours: Colormap,
    *,
    limit: tuple[float, float],
    label: str,
    whole: bool = False,
    mark: tuple[float, str] | None = None,
) -> Key:
    """A horizontal colour bar for `panel_figure`; `whole` puts ticks on whole numbers only.

    `mark` is a value with a line across the bar, and what stands above it.
    """

    def draw(figure: Figure, axes: list[Axes]) -> None:
        scale = ScalarMappable(Normalize(*limit), colours)
        alone = len(axes) == 1 and not axes[0].has_data()
        fraction = _KEY_INCHES / figure.get_figheight()  # of the height of all rows of panels
        shared = {"ax": axes, "shrink": 0.6, "aspect": 40, "fraction": fraction, "pad": 0.02, "use_gridspec": False}
        place: dict[str, Any] = {"cax": axes[0]} if alone else shared
        bar = figure.colorbar(scale, orientation="horizontal", label=label, **place)
        if whole:
            bar.locator = MaxNLocator(integer=True)
            bar.update_ticks()
        if mark is not None:
            value, text = mark
            bar.ax.axvline(value, color="#000000", linewidth=1.5)
            above = {"transform": bar.ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            bar.ax.text(value, 1.15, text, fontsize=7.5, **above)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]

    return draw


def wrapped(name: str, letters: int = 30) -> str:
    """A name of a variant over as many lines as it needs: what tells mixed recipes apart can be long."""
    return textwrap.fill(name, letters, break_long_words=False, break_on_hyphens=False)


def _add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One entry a name under all panels, in as few rows as are no wider than the figure."""
    labelled = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    entries = {wrapped(label, LEGEND_LETTERS): handle for handle, label in labelled}
    for rows in range(1, len(entries) + 1):
        columns = math.ceil(len(entries) / rows)
        legend = figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            break
        legend.remove()


def empty(ax: Axes, text: str) -> Axes:
    """An Axes that says in words that there is nothing to draw."""
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color=MUTED, wrap=True)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax
