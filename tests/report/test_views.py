"""Plots and comparisons in one call, and where they draw."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from normfree.analysis.entropy import newest_values
from normfree.report.views import compare, plot_curves, plot_heads
from tests.synthetic import write_run

IN_PYPLOT = """
import matplotlib.pyplot as plt
import normfree
from normfree.report.plots.style import panel_figure

figure, (left, right) = plt.subplots(1, 2)
plt.sca(left)
assert normfree.heatmap([[0.5, 0.2]], quantity="first_token_mass") is left
assert figure.axes[2].get_ylabel() == "Attention on the first token"
assert plt.gca() is left, "the colour bar must not become the current axes"
assert normfree.plot_heads(RUN, ax=right) is right
assert figure.axes[3].get_ylabel() == "Entropy (nats)"
plt.figure()
assert normfree.plot_curves(RUN) is plt.gca()
assert plt.gca().get_legend().get_texts()[0].get_text() == "SM+R"
before = plt.get_fignums()
panel_figure([lambda ax: normfree.heatmap([[1.0]], ax=ax)])
assert plt.get_fignums() == before and plt.gca().lines, "a report's figure must not touch pyplot"
"""


def test_plots_draw_into_the_current_axes_of_pyplot(tmp_path: Path) -> None:
    run = write_run(tmp_path, "SM+R")
    code = f"RUN = {str(run.folder)!r}\nimport matplotlib; matplotlib.use('agg'){IN_PYPLOT}"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_heads_of_a_run_have_its_ceiling(tmp_path: Path) -> None:
    run = write_run(tmp_path, "SM+R")
    ax = plot_heads(run, title="one")
    assert np.allclose(ax.images[0].get_array(), newest_values(run, "entropy_nats"))
    assert ax.images[0].get_clim()[1] == pytest.approx(np.max(newest_values(run, "ceiling_nats")))
    assert ax.figure.axes[1].get_ylabel() == "Entropy (nats)"
    with pytest.raises(ValueError, match="'loss' was not measured for each head; there are: entropy_nats"):
        plot_heads(run, "loss")


def test_a_comparison_begins_with_the_largest_difference(tmp_path: Path) -> None:
    first, second = write_run(tmp_path, "SM+G"), write_run(tmp_path, "SM+R", seed=1)
    difference_LH = newest_values(first, "entropy_nats") - newest_values(second, "entropy_nats")
    frame = compare(first, second.folder)
    assert len(frame) == difference_LH.size
    top = frame.iloc[0]
    assert abs(top.difference) == pytest.approx(np.abs(difference_LH).max())
    assert difference_LH[int(top.layer), int(top["head"])] == pytest.approx(top["first"] - top.second)
    image = plot_heads(first, minus=second, ax=Figure().subplots()).images[0]
    assert np.allclose(image.get_array(), difference_LH)
    assert image.get_clim() == pytest.approx((-abs(top.difference), abs(top.difference)))


def test_models_with_other_heads_are_not_compared(tmp_path: Path) -> None:
    wide = write_run(tmp_path, "SM+G", shape=(4, 8))
    with pytest.raises(ValueError, match=r"differ in \[layers, heads\]: \(4, 4\) and \(4, 8\)"):
        compare(write_run(tmp_path, "SM+R"), wide)


def test_curves_of_heads_are_their_mean(tmp_path: Path) -> None:
    run = write_run(tmp_path, "SM+R")
    ax = plot_curves(run, quantity="entropy_nats")
    first = run.series("probe", "entropy_nats")[0][1]
    assert ax.lines[0].get_ydata()[0] == pytest.approx(np.mean(first))
    assert ax.get_ylabel() == "Entropy (nats)"
    with pytest.raises(ValueError, match="'entropy' was not recorded over training; there are: loss"):
        plot_curves(run, quantity="entropy")
