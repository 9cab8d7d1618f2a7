"""Figures are pure, fit any shape, and show what is not finite as such; plots and comparisons in one call."""

import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normfree import Run, compare, heatmap, plot_curves, plot_heads
from normfree.analysis.entropy import newest_values, values_over_training
from normfree.analysis.groups import group_runs
from normfree.cost.totals import Point
from normfree.report.figures import heatmap_figure, layers_over_training
from normfree.report.plots.curves import layer_curves, loss_curves, overload_series, seed_curves
from normfree.report.plots.points import score_points, trade_off_points
from normfree.report.plots.style import variant_styles
from normfree.store.quantities import QUANTITIES, describe
from tests.synthetic import rewritten, write_run


def points(ax: Axes, line: int) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(ax.lines[line].get_xdata(), dtype=float), np.asarray(ax.lines[line].get_ydata(), dtype=float)


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def curves(draw: Callable[..., Axes], runs: Sequence[Run], **options: Any) -> Axes:
    groups = group_runs(runs)
    return draw(groups, ax=Figure().subplots(), styles=variant_styles([g.name for g in groups]), **options)


@pytest.mark.parametrize(("shape", "written"), [((1, 1), True), ((12, 12), True), ((48, 25), True), ((96, 64), False)])
def test_heatmap_writes_numbers_where_they_fit(shape: tuple[int, int], written: bool) -> None:
    ax = heatmap(np.full(shape, 1.234), ceiling=3.9)
    assert ax.images[0].get_size() == shape
    assert texts(ax) == (["1.23"] * (shape[0] * shape[1]) if written else [])
    ax.figure.canvas.draw()


def test_a_broken_head_is_hatched_and_named() -> None:
    ax = heatmap([[1.0, math.nan], [math.inf, 2.0]])
    assert texts(ax) == ["1.00", "NaN", "NaN", "2.00"]
    assert texts(heatmap([[99.99, -123.4, 27400.0, 1e6]])) == ["99.99", "-123", "27400", "1e+06"]
    assert [patch.get_hatch() for patch in ax.patches] == ["////", "////"]
    assert (ax.images[0].get_clim(), heatmap([[0.5]], ceiling=3.9).images[0].get_clim()) == ((0, 2.0), (0, 3.9))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        heatmap([1.0, 2.0, 3.0])


def test_colour_bar_marks_near_uniform_of_its_limit() -> None:
    titled = [("a", np.array([[1.0, 2.0]]), [0])]
    figures = (
        heatmap_figure(titled, label="", caption="", limit=3.878, mark=m) for m in ((0.75, "near uniform"), None)
    )
    known, unknown = (figure.whole().axes[1] for figure in figures if figure)
    assert texts(known) == ["near uniform from 2.91"]
    assert points(known, 0)[0].tolist() == pytest.approx([0.75 * 3.878] * 2)
    assert texts(unknown) == []


def test_plots_leave_matplotlib_as_they_found_it() -> None:
    code = (
        "import sys, matplotlib as mpl\n"
        "def settings(): return {k: mpl.rcParams[k] for k in mpl.rcParams if k != 'backend'}\n"  # that imports pyplot
        "before = settings(); from normfree import heatmap; heatmap([[1.0]])\n"
        "assert settings() == before and not {'torch', 'matplotlib.pyplot'} & sys.modules.keys()\n"
        "import matplotlib.pyplot; assert matplotlib.pyplot.get_fignums() == []"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_broken_layer_has_a_gap_and_a_mark(tmp_path: Path) -> None:
    run = write_run(tmp_path, "SM", status="diverged", broken_probe=True)
    history = values_over_training(run, "entropy_nats")
    ax = layer_curves(history, ax=Figure().subplots(), label="entropy", numbers=[0, 1, 2, 3], deepest=3, ceiling=3.0)
    assert math.isnan(points(ax, 1)[1][-1])
    assert "NaN from step 80" in texts(ax)[0]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_divergence_is_crossed_at_its_unlogged_step(tmp_path: Path, split: str) -> None:
    ax = curves(partial(loss_curves, split=split), [write_run(tmp_path, "SM", status="diverged")])
    assert points(ax, 0)[0][-1] < 100
    assert (ax.lines[1].get_marker(), points(ax, 1)[0][0]) == ("x", 100)


def test_the_loss_of_several_seeds_is_their_mean(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM", seed=seed) for seed in (0, 1)]
    mean, *seeds = curves(loss_curves, runs, split="validation").lines
    assert np.allclose(mean.get_ydata(), (seeds[0].get_ydata() + seeds[1].get_ydata()) / 2)
    assert max(line.get_linewidth() for line in seeds) < mean.get_linewidth()
    assert [line.get_label() for line in (mean, *seeds)].count("SM") == 1
    runs[1] = write_run(tmp_path / "diverged", "SM", seed=1, status="diverged")
    ax = curves(loss_curves, runs, split="train")
    assert [line.get_xdata()[-1] for line in ax.lines[:3]] == [90, 200, 90]  # the mean ends at the divergence


def test_the_loss_axis_excludes_the_first_fifth_of_training(tmp_path: Path) -> None:
    over, early = write_run(tmp_path, "SM", steps=1000), write_run(tmp_path, "SM", seed=1, steps=1000, status="failed")
    lines = [line for line in (early.folder / "metrics.jsonl").read_text().splitlines() if '"step": 10,' in line]
    early = rewritten(early, "\n".join(lines) + "\n")
    for runs, first_is_shown in (([over], False), ([over, early], True)):
        ax = curves(loss_curves, runs, split="train")
        steps, loss = points(ax, 0)
        low, high = ax.get_ylim()
        assert low < loss[-1] < loss[steps >= 200].max() < high
        assert bool(loss[0] < high) is first_is_shown


def test_a_broken_loss_is_crossed_and_not_smoothed(tmp_path: Path) -> None:
    run = write_run(tmp_path, "SM", steps=50)
    lines = (run.folder / "metrics.jsonl").read_text()
    broken = re.sub(r'("step": 30, "split": "train", "name": "loss", "value": )[0-9.]+', r'\1"NaN"', lines)
    assert broken != lines
    ax = curves(loss_curves, [rewritten(run, broken)], split="train")
    steps, loss = points(ax, 0)
    assert [step for step, value in zip(steps, loss, strict=True) if math.isnan(value)] == [30]
    assert points(ax, 1)[0][0] == 30


@pytest.mark.parametrize(
    "draw", [partial(loss_curves, split="train"), partial(seed_curves, series=overload_series, label="")]
)
def test_an_open_circle_ends_an_unfinished_run(tmp_path: Path, draw: Callable[..., Axes]) -> None:
    ax = curves(draw, [write_run(tmp_path, "SM"), write_run(tmp_path, "SM", seed=1, status="running")])
    whole, running, circle = ax.lines
    assert (circle.get_marker(), circle.get_fillstyle()) == ("o", "none")
    assert np.array_equal(circle.get_xydata(), running.get_xydata()[-1:])
    assert running.get_xdata()[-1] < whole.get_xdata()[-1]
    assert [line.get_label() for line in (whole, running)].count("SM") == 1


def test_every_seed_is_a_dot_above_their_mean(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, label, seed=seed) for label in ("SM+G", "SM") for seed in (0, 1)]
    runs += [write_run(tmp_path, "SM", seed=2, status="diverged"), write_run(tmp_path, "SM+R")]
    ax = curves(score_points, runs)
    dots = {line.get_ydata()[0]: sorted(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"}
    assert dots == {0: [37.7, pytest.approx(38.077)], 1: [36.1], 2: [52.0, pytest.approx(52.52)]}
    (mean,) = ax.containers
    assert mean.lines[0].get_xdata() == pytest.approx(37.8885)
    assert texts(ax) == ["n = 2", "n = 1", "NaN (1/3)"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["SM+G", "SM+R", "SM"]


def test_an_axis_with_a_seed_far_above_is_logarithmic(tmp_path: Path) -> None:
    values = zip("abcde", (30, 31, 32, 33, 90), strict=True)
    runs = [write_run(tmp_path, label, perplexity=value) for label, value in values]
    assert [curves(score_points, some).get_xscale() for some in (runs[:-1], runs)] == ["linear", "log"]
    assert [trade_off(ppl, [1, 2, 3]).get_yscale() for ppl in ([30, 31, 32], [30, 31, 90])] == ["linear", "log"]


def test_slopes_have_a_line_per_layer_in_its_colour(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, label) for label in ("SM+G/leaky", "SM+leaky, per layer", "SM+leaky, shared")]
    figure = layers_over_training(group_runs(runs), QUANTITIES["negative_slope"])
    assert figure is not None
    some, every, shared = (panel(ax=Figure().subplots()) for panel in figure.panels)
    assert (len(every.lines), len(shared.lines)) == (5, 1)  # slopes below 0 have a line at 0
    colours = [line.get_color() for line in every.lines]
    assert [line.get_color() for line in some.lines[:2]] == [colours[1], colours[3]]


def trade_off(perplexity: Sequence[float], gigabytes: Sequence[float], corpora: str = "") -> Axes:
    rows = enumerate(zip(perplexity, gigabytes, corpora or "x" * len(perplexity), strict=True))
    name = "SM+leaky, per layer (start{})"
    given = [Point(name.format(n), corpus, ppl, 1, 1e9 * gb, 1, True) for n, (ppl, gb, corpus) in rows]
    return trade_off_points(given, ax=Figure().subplots())


def test_a_trade_off_joins_each_front_and_names_what_diverged() -> None:
    steps = [line for line in trade_off([4, 3, 40, 30], [1, 2, 1, 2], "xxyy").lines if "steps" in line.get_drawstyle()]
    assert [list(line.get_ydata()) for line in steps] == [[4, 3], [40, 30]]
    ax = trade_off([4.0, *[math.nan] * 6], [1.0] * 7)
    (missing,) = (text for text in ax.texts if text.get_text().startswith("NaN"))
    assert missing.get_position()[1] < 0
    assert " ".join(missing.get_text().split()).endswith("(start5), SM+leaky, per layer (start6)")
    assert texts(trade_off([math.nan], [1.0])) == ["no variant has a finite perplexity"]


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


def test_differences_of_several_stacks_keep_the_order_of_layers(tmp_path: Path) -> None:
    stacks = ["encoder 0", "encoder 1", "decoder 0", "cross 0"]
    described = describe(["entropy_nats"])["entropy_nats"] | {"layers": stacks, "ceiling": None}
    facts = {"quantities": {"entropy_nats": described}}
    first, second = (write_run(tmp_path, label, facts=facts) for label in ("SM+G", "SM+R"))
    ax = plot_heads(first, minus=second, ax=Figure().subplots())
    difference_LH = newest_values(first, "entropy_nats") - newest_values(second, "entropy_nats")
    assert np.allclose(ax.images[0].get_array(), difference_LH)
    assert [label.get_text() for label in ax.get_yticklabels()][1:-1] == stacks  # a tick above and one below


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
