"""One cell a head: layers downwards, heads to the right.  L layers, H heads"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from normfree.analysis import OVERLOAD_SHARE
from normfree.plots.style import MUTED, Key, colour_key, panel_figure, wrapped

HEATMAP_COLOURS = mpl.colormaps["viridis"]
_SMALLEST_POINTS = 4.5
_NOT_FINITE = "#c9ced6"


def entropy_heatmap(
    entropy_LH: ArrayLike,
    *,
    ax: Axes | None = None,
    ceiling: ArrayLike | None = None,
    title: str = "",
    layers: Sequence[int] | None = None,
) -> Axes:
    """Draw the entropy of every head, [layers, heads].

    `ceiling` is the value of the brightest colour (one number, or one a layer of which the highest counts);
    give several heatmaps the same one to make them comparable. Without it the highest finite entropy is used.
    `layers` are the numbers of the rows where they are not 0, 1, ... as in models with attention in some layers only.
    Non-finite heads are hatched and say NaN. Values are written with two decimals where they fit.
    Without `ax` a figure with its own colour bar is made; it is `.figure` of what is returned.
    """
    entropy_LH = np.asarray(entropy_LH, dtype=float)
    if entropy_LH.ndim != 2 or entropy_LH.size == 0:
        raise ValueError(f"entropy has shape {entropy_LH.shape}; give one row a layer and one column a head")
    highest = _highest(entropy_LH if ceiling is None else np.asarray(ceiling, dtype=float))
    key = colour_key(HEATMAP_COLOURS, limit=(0, highest), label="entropy (nats)")
    numbers = range(len(entropy_LH)) if layers is None else layers
    draw = partial(_draw, entropy_LH, highest=highest, title=title, numbers=numbers)
    if ax is not None:
        return draw(ax=ax)
    figure = panel_figure(
        [draw],
        panel_inches=heatmap_size(*entropy_LH.shape),
        key=key if ceiling is None else entropy_key(highest),
    )
    return figure.axes[0]


def entropy_key(ceiling: float, *, unit: str = "nats") -> Key:
    """The colour bar of heatmaps up to a causal ceiling, with a mark from which heads count as near uniform."""
    near = OVERLOAD_SHARE * ceiling
    mark = (near, f"near uniform from {near:.2f}")
    return colour_key(HEATMAP_COLOURS, limit=(0, ceiling), label=f"entropy ({unit})", mark=mark)


def heatmap_size(layers: int, heads: int) -> tuple[float, float]:
    """Inches that give every cell room for its number, within what a page can show."""
    return min(max(0.9 + 0.3 * heads, 3.0), 9.0), min(max(0.9 + 0.24 * layers, 2.2), 9.0)


def _draw(entropy_LH: np.ndarray, *, ax: Axes, highest: float, title: str, numbers: Sequence[int]) -> Axes:
    layers, heads = entropy_LH.shape
    colours = HEATMAP_COLOURS.with_extremes(bad=_NOT_FINITE)
    scale = Normalize(0, highest)
    ax.imshow(entropy_LH, cmap=colours, norm=scale, aspect="auto", interpolation="none")
    ax.grid(visible=False)
    for layer, head in np.argwhere(~np.isfinite(entropy_LH)):
        corner = (head - 0.5, layer - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor=MUTED, linewidth=0))
    _write_values(entropy_LH, ax, lambda value: _text_colour(colours(scale(value))))
    ax.set(title=wrapped(title), xlabel="head", ylabel="layer")
    for axis, count in ((ax.xaxis, heads), (ax.yaxis, layers)):
        axis.set_major_locator(MaxNLocator(nbins=min(count, 12), integer=True, min_n_ticks=1))
    ax.yaxis.set_major_formatter(lambda row, _: str(numbers[round(row)]) if 0 <= round(row) < layers else "")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def _write_values(entropy_LH: np.ndarray, ax: Axes, colour_of: Any) -> None:
    """Two decimals in every cell, if the cells are wide and high enough for letters one can read."""
    layers, heads = entropy_LH.shape
    box = ax.get_window_extent()
    points = 72 / ax.get_figure(root=True).dpi  # pyright: ignore[reportOptionalMemberAccess]
    size = min(8.0, box.width * points / heads / 2.7, box.height * points / layers / 1.5)
    if size < _SMALLEST_POINTS:
        return
    for (layer, head), value in np.ndenumerate(entropy_LH):
        finite = math.isfinite(value)
        ax.text(
            head,
            layer,
            f"{value:.2f}" if finite else "NaN",
            ha="center",
            va="center",
            fontsize=size,
            color=colour_of(value) if finite else "#000000",
            in_layout=False,
            clip_on=True,
            bbox=None if finite else {"facecolor": _NOT_FINITE, "edgecolor": "none", "pad": 0.6},
        )


def _text_colour(rgba: tuple[float, ...]) -> str:
    """Black or white, whichever stands out more from a cell (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def _highest(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    highest = float(finite.max(initial=0.0))
    return highest if highest > 0 else 1.0
