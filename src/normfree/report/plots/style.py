"""The look of every figure, in colours that colour-blind readers can tell apart (tested), and its reproducible bytes.

Figures of reports are built without pyplot, so that no state outlives a call.
"""

import importlib
import io
import itertools
import math
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Panel = Callable[..., Any]  # draws into the Axes `ax`
Key = Callable[[Figure, list[Axes]], Any]  # draws the colour bar that the panels of a figure share
Styles = Mapping[str, Mapping[str, Any]]  # colour and dash of each variant's line, by its name

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
"""Each colour on white and on the dark background of the page. Red is for values that are not finite."""
_ON_WHITE = {name: on_white for name, (on_white, _) in COLOURS.items()}
INK, MUTED, GRID, GREEN, RED = (_ON_WHITE[name] for name in ("ink", "muted", "grid", "green", "red"))
# Blue with LayerNorm, orange and green without; the dash distinguishes them in greyscale.
_VARIANTS = {
    "SM+LN+G": {"color": _ON_WHITE["blue"], "linestyle": "--"},
    "SM+LN+R": {"color": _ON_WHITE["sky"], "linestyle": "-."},
    "SM+G": {"color": _ON_WHITE["orange"], "linestyle": "-"},
    "SM+R": {"color": GREEN, "linestyle": (0, (8, 1.5))},
}
_OTHERS = tuple(_ON_WHITE[name] for name in ("purple", "gold", "violet", "olive", "grey"))
PANEL_INCHES = (3.9, 3.1)
_COMMENT = re.compile(r"<!--.*?-->|<metadata>.*?</metadata>", re.DOTALL)
_ID = re.compile(r' id="([^"]*)"')
_COORDINATES = re.compile(r' (?:d|x|y)="[^"]*"')
_SUPERFLUOUS = re.compile(r""" transform="rotate\(-0 [^"]*"|font-family: 'DejaVu Sans'; |; stroke-linecap: square""")
_DECIMALS = re.compile(r"(\.\d)\d+")
_TITLE = re.compile(r' id="title:([^"]*)">')
_USED = re.compile(r'(?:url\(#|href="#)([^")]+)')


def drawing_settings(**more: Any) -> AbstractContextManager[None]:
    """Use these settings instead of the user's, and restore the user's afterwards."""
    return style.context(["default", Path(__file__).with_name("figure.mplstyle"), more])


def axes_to_draw_in(size: tuple[float, float]) -> Axes:
    """pyplot's current axes, else those of a new figure of this size in inches; not pyplot's if nobody imported it."""
    if "ipykernel" in sys.modules:  # a notebook shows only pyplot's figures
        importlib.import_module("matplotlib.pyplot")
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot and pyplot.get_fignums():
        return pyplot.gca()
    return (pyplot.figure if pyplot else Figure)(figsize=size, layout="constrained").subplots()


def variant_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Line colour and dash of each name. The paper's four variants always look the same."""
    looks = itertools.product(("-", "--", "-.", ":"), _OTHERS)
    free = itertools.cycle({"color": colour, "linestyle": dash} for dash, colour in looks)
    labels = {name: name.partition(" (")[0] for name in names}  # SM+G (2e-3) looks like SM+G if it is the only one
    unique = {name: label for name, label in labels.items() if list(labels.values()).count(label) == 1}
    return {name: _VARIANTS.get(unique.get(name, name)) or next(free) for name in names}


def panel_figure(
    panels: Sequence[Panel], *, panel_inches: tuple[float, float] = PANEL_INCHES, key: Key | None = None
) -> Figure:
    """Panels in two columns of one figure, with one legend below and, with `key`, a shared colour bar."""
    columns = min(2, len(panels))
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
        labelled = [pair for ax in grid for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
        if entries := {wrapped(label, 20): handle for handle, label in labelled}:
            figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=2 * columns)
        # Run once here: a figure that keeps its layout engine is drawn twice by every savefig.
        ConstrainedLayoutEngine().execute(figure)
    return figure


def colour_key(
    colours: Colormap | str,
    *,
    limit: tuple[float, float],
    label: str,
    whole: bool = False,
    mark: tuple[float, str] | None = None,
) -> Key:
    """A horizontal colour bar for `panel_figure`. `whole`: ticks on whole numbers; `mark`: a value with its label."""

    def draw(figure: Figure, axes: list[Axes]) -> None:
        scale = ScalarMappable(Normalize(*limit), colours)
        alone = len(axes) == 1 and not axes[0].has_data()
        fraction = 0.3 / figure.get_figheight()
        shared = {"ax": axes, "shrink": 0.6, "aspect": 40, "fraction": fraction, "pad": 0.02, "use_gridspec": False}
        place: dict[str, Any] = {"cax": axes[0]} if alone else shared
        ticks = MaxNLocator(integer=True) if whole else None
        bar = figure.colorbar(scale, orientation="horizontal", label=label, ticks=ticks, **place)
        if mark is not None:
            value, text = mark
            bar.ax.axvline(value, color="#000000", linewidth=1.5)
            above = {"transform": bar.ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            bar.ax.text(value, 1.15, text, fontsize=7.5, **above)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]

    return draw


def wrapped(name: str, letters: int = 30) -> str:
    """A name of a variant on several lines: names of mixed recipes can be long."""
    return textwrap.fill(name, letters, break_long_words=False, break_on_hyphens=False)


def empty(ax: Axes, text: str) -> Axes:
    """An Axes with a sentence instead of data."""
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color=MUTED, wrap=True)
    ax.set(xticks=[], yticks=[])
    return ax


def to_svg(figure: Figure, name: str) -> str:
    """Inline SVG: text stays text, colours follow the page, `name` makes the ids; a gid `title:TEXT` shows on hover."""
    with drawing_settings(**{"svg.fonttype": "none", "svg.hashsalt": name}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = _COMMENT.sub("", file.getvalue())
    text = text[text.index("<svg") :]
    text = _TITLE.sub(r"><title>\1</title>", text)
    text = _COORDINATES.sub(lambda match: _DECIMALS.sub(r"\1", match[0]), _SUPERFLUOUS.sub("", text))
    used = set(_USED.findall(text))
    text = _ID.sub(lambda match: match[0] if match[1] in used else "", text)
    for colour, (on_white, _) in COLOURS.items():  # the page defines them for light and dark mode
        text = text.replace(on_white, f"var(--{colour})")
    # As wide as the box around it, and hidden from screen readers, which read the name of the figure.
    head, _, drawing = text.partition(">")
    head = re.sub(r' (?:width|height|xmlns(?::\w+)?|version)="[^"]*"', "", head)
    drawing = re.sub(r"\s*\n\s*", "\n", drawing).replace("\nL ", "L ")
    return f'{head} aria-hidden="true" focusable="false">{drawing}'


def to_file(figure: Figure, suffix: str) -> bytes:
    """A `pdf` for papers, with TrueType text and no date, or a `png` on white, 150 dots an inch."""
    options = {"pdf": {"metadata": {"CreationDate": None}}, "png": {"dpi": 150, "facecolor": "white"}}
    file = io.BytesIO()
    with drawing_settings(**{"pdf.fonttype": 42}):
        figure.savefig(file, format=suffix, **options[suffix])
    return file.getvalue()


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 times powers of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
