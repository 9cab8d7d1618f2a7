"""Heatmaps with one cell per head: layers downwards, heads to the right.  L layers, H heads"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from normfree.report.plots.style import MUTED, Key, Panel, axes_to_draw_in, colour_key, wrapped
from normfree.store.quantities import QUANTITIES, Quantity

HEATMAP_COLOURS = mpl.colormaps["viridis"]
DIFFERENCE_COLOURS = mpl.colormaps["RdBu_r"]
_SMALLEST_POINTS = 4.5
_NOT_FINITE = "#c9ced6"


def heatmap(
    values_LH: ArrayLike,
    *,
    quantity: Quantity | str = "entropy_nats",
    ax: Axes | None = None,
    ceiling: ArrayLike | None = None,
    title: str = "",
    layers: Sequence[int] | None = None,
) -> Axes:
    """Draw one number per head, [layers, heads]. Non-finite heads are hatched and labelled NaN.

    `ceiling`: the value of the brightest colour (one number, or the highest of one per layer), by default the highest
    finite value; heatmaps with the same ceiling are comparable. `layers`: the numbers of the rows if not 0, 1, ...
    Without `ax` it is drawn with a colour bar into pyplot's current axes or, unless pyplot was imported, into a new
    figure, which is `.figure` of the result.

    Raises ValueError for values of another shape.
    """
    values_LH = np.asarray(values_LH, dtype=float)
    if values_LH.ndim != 2 or values_LH.size == 0:
        raise ValueError(f"values have shape {values_LH.shape}; give [layers, heads]")
    if isinstance(quantity, str):
        quantity = QUANTITIES[quantity]
    highest = highest_finite(values_LH if ceiling is None else np.asarray(ceiling, dtype=float))
    numbers = range(len(values_LH)) if layers is None else layers
    draw = partial(draw_cells, values_LH, highest=highest, title=title, numbers=numbers)
    return draw_with_bar(draw, values_LH.shape, quantity.label) if ax is None else draw(ax=ax)


def draw_with_bar(draw: Panel, shape: tuple[int, ...], label: str, ax: Axes | None = None) -> Axes:
    """Draw a heatmap of this shape and its colour bar into `ax`, else pyplot's current axes, else a new figure."""
    width, height = heatmap_size(shape)
    ax = ax or axes_to_draw_in((width + 1, height))
    draw(ax=ax).get_figure(root=True).colorbar(ax.images[-1], ax=ax, label=label)
    return ax


def heatmap_key(quantity: Quantity, highest: float, *, unit: str | None = None, marked: bool = True) -> Key:
    """The colour bar of heatmaps up to `highest`, with the quantity's mark if `highest` is its ceiling."""
    label = quantity.label if unit is None else f"{quantity.title} ({unit})"
    mark = None
    if quantity.mark is not None and marked:
        edge = quantity.mark[0] * highest
        mark = (edge, f"{quantity.mark[1]} from {edge:.2f}")
    return colour_key(HEATMAP_COLOURS, limit=(0, highest), label=label, mark=mark)


def heatmap_size(*shapes: tuple[int, ...]) -> tuple[float, float]:
    """Size in inches with room for a number in every cell of any of these shapes, limited to the width of the page."""
    layers, heads = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    return min(max(0.9 + 0.3 * heads, 3.0), 9.0), min(max(0.9 + 0.24 * layers, 2.2), 9.0)


def draw_cells(
    values_LH: np.ndarray,
    *,
    ax: Axes,
    highest: float,
    title: str,
    numbers: Sequence[int],
    lowest: float = 0.0,
    colours: Colormap = HEATMAP_COLOURS,
) -> Axes:
    """Draw one coloured cell per head; heads that are not finite are hatched."""
    layers, heads = values_LH.shape
    colours = colours.with_extremes(bad=_NOT_FINITE)
    image = ax.imshow(values_LH, cmap=colours, vmin=lowest, vmax=highest, aspect="auto", interpolation="none")
    ax.grid(visible=False)
    for layer, head in np.argwhere(~np.isfinite(values_LH)):
        corner = (head - 0.5, layer - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor=MUTED, linewidth=0))
    _write_values(values_LH, image)
    ax.set(title=wrapped(title), xlabel="head", ylabel="layer")
    for axis, count in ((ax.xaxis, heads), (ax.yaxis, layers)):
        axis.set_major_locator(MaxNLocator(nbins=min(count, 12), integer=True, min_n_ticks=1))
    ax.yaxis.set_major_formatter(lambda row, _: str(numbers[round(row)]) if 0 <= round(row) < layers else "")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def _write_values(values_LH: np.ndarray, image: AxesImage) -> None:
    """Two decimals in every cell, if the cells are large enough to read them."""
    layers, heads = values_LH.shape
    box = image.axes.get_window_extent()
    points = 72 / image.axes.get_figure(root=True).dpi  # pyright: ignore[reportOptionalMemberAccess]
    size = min(8.0, box.width * points / heads / 2.7, box.height * points / layers / 1.5)
    if size < _SMALLEST_POINTS:
        return
    # Black or white, whichever stands out more from the cell (WCAG relative luminance).
    is_light_LH = image.to_rgba(np.ma.masked_invalid(values_LH))[..., :3] ** 2.2 @ (0.2126, 0.7152, 0.0722) > 0.179
    style = {"ha": "center", "va": "center", "fontsize": size, "in_layout": False, "clip_on": True}
    for (layer, head), value in np.ndenumerate(values_LH):
        text = image.axes.text(head, layer, f"{value:z.2f}", color="k" if is_light_LH[layer, head] else "w", **style)
        if not np.isfinite(value):
            text.set_text("NaN")
            text.set_bbox({"facecolor": _NOT_FINITE, "edgecolor": "none", "pad": 0.6})


def highest_finite(values: np.ndarray) -> float:
    """The highest finite value, or 1 if none is above 0."""
    return float(values[np.isfinite(values)].max(initial=0.0)) or 1.0
