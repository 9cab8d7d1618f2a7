"""Heatmaps with one cell per head: layers downwards, heads to the right.  L layers, H heads"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from normfree.report.plots.style import MUTED, axes_to_draw_in, wrapped
from normfree.store.quantities import QUANTITIES

HEATMAP_COLOURS, DIFFERENCE_COLOURS = "viridis", "RdBu_r"
_HEIGHT, _LEFT, _BOTTOM = 20, 26, 18


@dataclass(frozen=True)
class Heatmap:
    """The heads of one model, on a scale that heatmaps side by side share."""

    title: str
    values_LH: np.ndarray  # masked where a layer has fewer heads than another
    layers: Sequence[int | str]  # numbers or names of the rows
    limits: tuple[float, float]
    colours: str = HEATMAP_COLOURS

    @property
    def colour_map(self) -> Colormap:
        """Its colours, and grey for heads that are not finite."""
        return mpl.colormaps[self.colours].with_extremes(bad="#c9ced6")

    def colour_cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Red, green and blue of every cell, and whether black stands out more from it than white (WCAG luminance)."""
        cells_LH3 = self.colour_map(Normalize(*self.limits)(np.ma.masked_invalid(self.values_LH)))[..., :3]
        return cells_LH3, cells_LH3**2.2 @ (0.2126, 0.7152, 0.0722) > 0.179

    def draw(self, *, ax: Axes) -> Axes:
        """Draw one coloured cell per head; heads that are not finite are hatched."""
        values_LH, (low, high), numbers = self.values_LH, self.limits, self.layers
        layers, heads = values_LH.shape
        image = ax.imshow(values_LH, cmap=self.colour_map, vmin=low, vmax=high, aspect="auto", interpolation="none")
        ax.grid(visible=False)
        for layer, head in np.argwhere(np.ma.filled(~np.isfinite(values_LH), fill_value=False)):
            corner = (head - 0.5, layer - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor=MUTED, linewidth=0))
        _write_values(self, image)
        ax.set(title=wrapped(self.title), xlabel="head", ylabel="layer")
        for axis, count in ((ax.xaxis, heads), (ax.yaxis, layers)):
            axis.set_major_locator(MaxNLocator(nbins=min(count, 12), integer=True, min_n_ticks=1))
        ax.yaxis.set_major_formatter(lambda row, _: str(numbers[round(row)]) if 0 <= round(row) < layers else "")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        return ax

    def svg(self) -> Markup:
        """Hand-written SVG for the page: small, fast, with values on hover. Heads that are not finite are grey."""
        layers, heads = self.values_LH.shape
        width = 30 if heads <= 16 else 16
        left = max(_LEFT, 10 + 6 * max(len(str(layer)) for layer in self.layers))  # room for "encoder 0"
        parts, (fills_LH3, is_light_LH) = [], self.colour_cells()
        for layer, head in zip(*np.nonzero(~np.ma.getmaskarray(self.values_LH)), strict=True):
            value = self.values_LH[layer, head]
            x, y = left + head * width, layer * _HEIGHT
            text = f"{value:z.2f}" if np.isfinite(value) else "NaN"  # on hover; a cell has room for five characters
            parts.append(f'<rect x="{x}" y="{y}" fill="{to_hex(tuple(fills_LH3[layer, head]))}">')
            parts.append(f"<title>layer {escape(self.layers[layer])} head {head}: {text}</title></rect>")
            if width == 30:
                shade = "" if is_light_LH[layer, head] else ' fill="#fff"'
                parts.append(f'<text x="{x + 15}" y="{y + 14}"{shade}>{_number(value)}</text>')
        middle, every = left // 2 + 1, 1 + layers // 24
        rows = [(middle, layer * _HEIGHT + 14, self.layers[layer]) for layer in range(0, layers, every)]
        columns = [
            (left + (head + 0.5) * width, layers * _HEIGHT + 14, head) for head in range(0, heads, 1 + heads // 17)
        ]
        parts += [f'<text class="axis" x="{x}" y="{y}">{number}</text>' for x, y, number in (*rows, *columns)]
        box = f"0 0 {left + heads * width} {layers * _HEIGHT + _BOTTOM}"
        size = f"width: {1.15 * (left + heads * width):.0f}px; max-width: 100%"
        opening = f'<svg class="cells{"" if width == 30 else " small"}" viewBox="{box}" aria-hidden="true">'
        title = escape(self.title)
        return Markup(f'<div style="{size}"><p class="panel-title">{title}</p>{opening}{"".join(parts)}</svg></div>')


def heatmap(
    values_LH: ArrayLike, *, quantity: str = "entropy_nats", ax: Axes | None = None, ceiling: ArrayLike | None = None
) -> Axes:
    """Draw one number per head, [layers, heads]. Non-finite heads are hatched and labelled NaN.

    `ceiling`: the value of the brightest colour (one number, or the highest of one per layer), by default the highest
    finite value; heatmaps with the same ceiling are comparable. Without `ax` it is drawn with a colour bar into
    pyplot's current axes or, unless pyplot was imported, into a new figure, which is `.figure` of the result. Raises
    ValueError for values of another shape.
    """
    values_LH = np.asarray(values_LH, dtype=float)
    if values_LH.ndim != 2 or values_LH.size == 0:
        raise ValueError(f"values have shape {values_LH.shape}; give [layers, heads]")
    highest = highest_finite(values_LH if ceiling is None else np.asarray(ceiling, dtype=float))
    drawing = Heatmap("", values_LH, range(len(values_LH)), (0.0, highest))
    return draw_with_bar(drawing, QUANTITIES[quantity].label) if ax is None else drawing.draw(ax=ax)


def draw_with_bar(drawing: Heatmap, label: str, ax: Axes | None = None) -> Axes:
    """Draw a heatmap and its colour bar into `ax`, else pyplot's current axes, else a new figure."""
    width, height = heatmap_size([drawing])
    ax = drawing.draw(ax=ax or axes_to_draw_in((width + 1, height)))
    ax.get_figure(root=True).colorbar(ax.images[-1], ax=ax, label=label)  # pyright: ignore[reportOptionalMemberAccess]
    return ax


def heatmap_size(drawings: Sequence[Heatmap]) -> tuple[float, float]:
    """Size in inches with room for a number in every cell of any of these, limited to the width of the page."""
    layers, heads = np.max([drawing.values_LH.shape for drawing in drawings], axis=0).tolist()
    return min(max(0.9 + 0.3 * heads, 3.0), 9.0), min(max(0.9 + 0.24 * layers, 2.2), 9.0)


def _write_values(drawing: Heatmap, image: AxesImage) -> None:
    """Two decimals in every cell, if the cells are large enough to read them."""
    layers, heads = drawing.values_LH.shape
    box = image.axes.get_window_extent()
    points = 72 / image.axes.get_figure(root=True).dpi  # pyright: ignore[reportOptionalMemberAccess]
    size = min(8.0, box.width * points / heads / 2.7, box.height * points / layers / 1.5)
    if size < 4.5:
        return
    style = {"ha": "center", "va": "center", "fontsize": size, "in_layout": False, "clip_on": True}
    for (layer, head), is_light in np.ndenumerate(drawing.colour_cells()[1]):
        value = drawing.values_LH[layer, head]
        if value is np.ma.masked:
            continue
        text = image.axes.text(head, layer, _number(value), color="k" if is_light else "w", **style)
        if not np.isfinite(value):
            text.set_bbox({"facecolor": drawing.colour_map.get_bad(), "edgecolor": "none", "pad": 0.6})


def _number(value: Any) -> str:
    """A number in at most five characters, six if it is negative."""
    if not np.isfinite(value):
        return "NaN"
    return f"{value:z.2f}" if abs(value) < 99.995 else f"{value:.0f}" if abs(value) < 99999.5 else f"{value:.0e}"


def highest_finite(values: np.ndarray) -> float:
    """The highest finite value, or 1 if none is above 0."""
    values = np.asarray(values)  # masked cells hold NaN
    return float(values[np.isfinite(values)].max(initial=0.0)) or 1.0
