"""Figures: pure functions, arrays and runs in, matplotlib Axes out. Nothing here writes a file."""

from normfree.report.plots.bars import range_bars, range_bars_size, slope_perplexity
from normfree.report.plots.curves import (
    LAYER_COLOURS,
    curves_size,
    depth_profile,
    layer_curves,
    loss_curves,
    nonfinite_curves,
    overload_curves,
    scalar_curves,
    slope_curves,
    slope_limits,
)
from normfree.report.plots.heatmaps import HEATMAP_COLOURS, difference_heatmap, heatmap, heatmap_key, heatmap_size
from normfree.report.plots.perplexity import perplexity_points, perplexity_points_size
from normfree.report.plots.style import COLOURS, Key, Panel, colour_key, panel_figure, variant_styles
from normfree.report.plots.tradeoff import trade_off, trade_off_size
