"""Heatmaps as hand-written SVG for the page: small, fast, with the value of a cell on hover.  L layers, H heads"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape
from matplotlib.colors import Colormap, to_hex

_HEIGHT, _LEFT, _BOTTOM = 20, 26, 18


def cells_svg(
    values_LH: np.ndarray, *, limits: tuple[float, float], colours: Colormap, numbers: Sequence[int], title: str
) -> Markup:
    """The heatmap of one model below its title. Heads that are not finite are grey and say NaN."""
    layers, heads = values_LH.shape
    width = 30 if heads <= 16 else 16
    low, high = limits
    parts = []
    for (layer, head), value in np.ndenumerate(values_LH):
        x, y, finite = _LEFT + head * width, layer * _HEIGHT, np.isfinite(value)
        rgb = np.array(colours((value - low) / (high - low))[:3]) if finite else np.array([0.79, 0.81, 0.84])
        text = f"{value:z.2f}" if finite else "NaN"
        parts.append(f'<rect x="{x}" y="{y}" fill="{to_hex(tuple(rgb))}">')
        parts.append(f"<title>layer {numbers[layer]} head {head}: {text}</title></rect>")
        if width == 30:  # black or white, whichever stands out more (WCAG relative luminance)
            shade = "" if rgb**2.2 @ (0.2126, 0.7152, 0.0722) > 0.179 else ' fill="#fff"'
            parts.append(f'<text x="{x + 15}" y="{y + 14}"{shade}>{text}</text>')
    rows = [(_LEFT - 12, layer * _HEIGHT + 14, numbers[layer]) for layer in range(0, layers, 1 + layers // 24)]
    columns = [(_LEFT + (head + 0.5) * width, layers * _HEIGHT + 14, head) for head in range(0, heads, 1 + heads // 17)]
    parts += [f'<text class="axis" x="{x}" y="{y}">{number}</text>' for x, y, number in (*rows, *columns)]
    box = f"0 0 {_LEFT + heads * width} {layers * _HEIGHT + _BOTTOM}"
    size = f"width: {1.15 * (_LEFT + heads * width):.0f}px; max-width: 100%"
    opening = f'<svg class="cells{"" if width == 30 else " small"}" viewBox="{box}" aria-hidden="true">'
    return Markup(
        f'<div style="{size}"><p class="panel-title">{escape(title)}</p>{opening}{"".join(parts)}</svg></div>'
    )
