"""Figures are pure, fit any shape, and show what is not finite as such."""

from __future__ import annotations

import io
import itertools
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from normfree.analysis.entropy import RangeCounts, final_heads
from normfree.analysis.groups import group_runs
from normfree.analysis.quantities import values_over_training
from normfree.report import plots
from normfree.report.plots.tradeoff import apart
from tests.synthetic import rewritten, write_run


def points(ax: Axes, line: int) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(ax.lines[line].get_xdata(), dtype=float), np.asarray(ax.lines[line].get_ydata(), dtype=float)


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize(
    ("shape", "written"),
    [((1, 1), True), ((2, 3), True), ((12, 12), True), ((48, 25), True), ((96, 64), False)],
)
def test_heatmap_takes_any_shape_and_writes_numbers_where_they_fit(shape: tuple[int, int], written: bool) -> None:
    ax = plots.heatmap(np.full(shape, 1.234), ceiling=3.9)
    assert ax.images[0].get_size() == shape
    assert texts(ax) == (["1.23"] * (shape[0] * shape[1]) if written else [])
    ax.figure.canvas.draw()


def test_a_broken_head_is_hatched_and_named_never_zero() -> None:
    ax = plots.heatmap([[1.0, math.nan], [math.inf, 2.0]])
    assert texts(ax) == ["1.00", "NaN", "NaN", "2.00"]
    assert [patch.get_hatch() for patch in ax.patches] == ["////", "////"]
    assert ax.images[0].get_clim() == (0, 2.0)


def test_heatmaps_share_a_scale_when_given_one_ceiling() -> None:
    figure = plots.panel_figure([lambda ax, v=v: plots.heatmap([[v]], ax=ax, ceiling=3.9) for v in (0.5, 3.0)])
    assert {ax.images[0].get_clim() for ax in figure.axes} == {(0, 3.9)}


def test_the_colour_bar_marks_where_heads_count_as_near_uniform_if_the_ceiling_is_known() -> None:
    known, unknown = (plots.heatmap([[1.0, 2.0]], ceiling=ceiling).figure.axes[1] for ceiling in (3.878, None))
    assert texts(known) == ["near uniform from 2.91"]
    assert points(known, 0)[0].tolist() == pytest.approx([0.75 * 3.878] * 2)
    assert texts(unknown) == []


def test_heatmap_refuses_what_is_not_layers_by_heads() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        plots.heatmap([1.0, 2.0, 3.0])


def test_plots_leave_matplotlib_as_they_found_it() -> None:
    code = (
        "import sys, matplotlib as mpl; before = dict(mpl.rcParams)\n"
        "from normfree import heatmap; heatmap([[1.0]])\n"
        "assert dict(mpl.rcParams) == before and 'torch' not in sys.modules\n"
        "import matplotlib.pyplot; assert matplotlib.pyplot.get_fignums() == []"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_variants_keep_their_colours_in_every_figure() -> None:
    one = plots.variant_styles(["SM+G", "x"])
    two = plots.variant_styles(["x", "y", "SM+R", "SM+G"])
    assert one["SM+G"] == two["SM+G"]
    many = plots.variant_styles([f"v{i}" for i in range(20)])
    assert len({(s["color"], s["linestyle"]) for s in many.values()}) == 20


def test_a_layer_that_breaks_has_a_line_that_ends_and_a_mark(tmp_path: Path) -> None:
    run = write_run(tmp_path, "SM", status="diverged", broken_probe=True)
    ax = Figure().subplots()
    plots.layer_curves(values_over_training(run, "entropy_nats"), ax=ax, label="entropy", ceiling=3.0)
    assert math.isnan(points(ax, 1)[1][-1])
    assert "NaN from step 80" in texts(ax)[0]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_divergence_is_crossed_though_its_step_is_never_logged(tmp_path: Path, split: str) -> None:
    groups = group_runs([write_run(tmp_path, "SM", status="diverged")])
    ax = Figure().subplots()
    plots.loss_curves(groups, ax=ax, split=split, styles=plots.variant_styles(["SM"]))
    assert points(ax, 0)[0][-1] < 100
    assert ax.lines[1].get_marker() == "x"
    assert points(ax, 1)[0][0] == 100


def test_the_loss_of_several_seeds_is_their_mean_over_thin_lines(tmp_path: Path) -> None:
    groups = group_runs([write_run(tmp_path, "SM", seed=seed) for seed in (0, 1)])
    ax = Figure().subplots()
    plots.loss_curves(groups, ax=ax, split="validation", styles=plots.variant_styles(["SM"]))
    mean, *seeds = ax.lines
    assert np.allclose(mean.get_ydata(), (seeds[0].get_ydata() + seeds[1].get_ydata()) / 2)
    assert max(line.get_linewidth() for line in seeds) < mean.get_linewidth()
    assert [line.get_label() for line in ax.lines].count("SM") == 1


def test_the_mean_loss_ends_where_a_seed_diverged(tmp_path: Path) -> None:
    groups = group_runs([write_run(tmp_path, "SM"), write_run(tmp_path, "SM", seed=1, status="diverged")])
    ax = Figure().subplots()
    plots.loss_curves(groups, ax=ax, split="train", styles=plots.variant_styles(["SM"]))
    assert [line.get_xdata()[-1] for line in ax.lines[:3]] == [90, 200, 90]


def test_the_axis_of_losses_leaves_out_the_first_fifth_but_no_run_that_is_still_there(tmp_path: Path) -> None:
    styles = plots.variant_styles(["SM"])
    over, early = write_run(tmp_path, "SM", steps=1000), write_run(tmp_path, "SM", seed=1, steps=1000, status="failed")
    lines = [line for line in (early.folder / "metrics.jsonl").read_text().splitlines() if '"step": 10,' in line]
    early = rewritten(early, "\n".join(lines) + "\n")
    for runs, first_is_shown in (([over], False), ([over, early], True)):
        ax = Figure().subplots()
        plots.loss_curves(group_runs(runs), ax=ax, split="train", styles=styles)
        steps, loss = points(ax, 0)
        low, high = ax.get_ylim()
        assert low < loss[-1] < loss[steps >= 200].max() < high
        assert bool(loss[0] < high) is first_is_shown


def test_a_loss_that_breaks_is_crossed_and_not_smoothed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path, "SM", steps=50)
    lines = (run.folder / "metrics.jsonl").read_text()
    broken = re.sub(r'("step": 30, "split": "train", "name": "loss", "value": )[0-9.]+', r'\1"NaN"', lines)
    assert broken != lines
    ax = Figure().subplots()
    styles = plots.variant_styles(["SM"])
    plots.loss_curves(group_runs([rewritten(run, broken)]), ax=ax, split="train", styles=styles)
    steps, loss = points(ax, 0)
    assert [step for step, value in zip(steps, loss, strict=True) if math.isnan(value)] == [30]
    assert points(ax, 1)[0][0] == 30


def test_an_open_circle_ends_the_line_of_a_run_that_is_not_over(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM"), write_run(tmp_path, "SM", seed=1, status="running")]
    (group,) = group_runs(runs)
    styles = plots.variant_styles(["SM"])
    for curves in (partial(plots.loss_curves, split="train"), plots.overload_curves, plots.nonfinite_curves):
        ax = curves([group], ax=Figure().subplots(), styles=styles)
        whole, running, circle = ax.lines
        assert (circle.get_marker(), circle.get_fillstyle()) == ("o", "none")
        assert np.array_equal(circle.get_xydata(), running.get_xydata()[-1:])
        assert running.get_xdata()[-1] < whole.get_xdata()[-1]
        assert [line.get_label() for line in (whole, running)].count("SM") == 1


def test_nonfinite_rows_are_a_share_of_all_rows(tmp_path: Path) -> None:
    groups = group_runs([write_run(tmp_path, "SM", broken_probe=True)])
    ax = Figure().subplots()
    plots.nonfinite_curves(groups, ax=ax, styles=plots.variant_styles(["SM"]))
    assert points(ax, 0)[1][-1] == 75.0
    assert points(ax, 0)[1][0] == 0.0
    assert len(ax.lines) == 1


def test_a_divergence_between_probes_is_crossed_where_rows_are_counted(tmp_path: Path) -> None:
    ax = Figure().subplots()
    groups = group_runs([write_run(tmp_path, "SM", status="diverged")])
    plots.nonfinite_curves(groups, ax=ax, styles=plots.variant_styles(["SM"]))
    assert (ax.lines[1].get_marker(), points(ax, 1)[0][0]) == ("x", 100)


def test_every_seed_is_a_dot_and_a_mean_stands_below_those_that_all_ended_well(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, label, seed=seed) for label in ("SM+G", "SM") for seed in (0, 1)]
    runs += [write_run(tmp_path, "SM", seed=2, status="diverged"), write_run(tmp_path, "SM+R")]
    groups = group_runs(runs)
    ax = Figure().subplots()
    plots.perplexity_points(groups, ax=ax, styles=plots.variant_styles([group.name for group in groups]))
    dots = {line.get_ydata()[0]: sorted(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"}
    assert dots == {0: [37.7, pytest.approx(38.077)], 1: [36.1], 2: [52.0, pytest.approx(52.52)]}
    (mean,) = ax.containers
    assert mean.lines[0].get_xdata() == pytest.approx(37.8885)
    assert texts(ax) == ["n = 2", "n = 1", "NaN (1/3)"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["SM+G", "SM+R", "SM"]


def test_a_seed_far_above_the_others_is_an_arrow_with_its_number(tmp_path: Path) -> None:
    groups = group_runs(
        [
            write_run(tmp_path, label, perplexity=value)
            for label, value in zip("abcde", (30, 31, 32, 33, 90), strict=True)
        ]
    )
    ax = Figure().subplots()
    plots.perplexity_points(groups, ax=ax, styles=plots.variant_styles("abcde"))
    assert ax.get_xlim()[1] < 40
    assert "90.0" in texts(ax)
    assert [line.get_marker() for line in ax.lines].count(">") == 1


def test_range_bars_add_up_to_all_heads_with_the_broken_hatched() -> None:
    ax = Figure().subplots()
    plots.range_bars({"a": RangeCounts((1, 0, 2, 0), 1)}, ax=ax)
    bars = [patch for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_width()]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(100)
    assert [bar.get_hatch() for bar in bars] == [None, None, "////"]


def test_slopes_have_a_line_a_layer_or_one(tmp_path: Path) -> None:
    figure = Figure()
    layers, shared = figure.subplots(2)
    plots.slope_curves(write_run(tmp_path, "SM+leaky, per layer"), ax=layers)
    plots.slope_curves(write_run(tmp_path, "SM+leaky, shared"), ax=shared)
    assert (len(layers.lines), len(shared.lines)) == (5, 2)  # and the line at 0


def test_slopes_that_are_compared_have_one_axis_that_holds_them_and_zero(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, label) for label in ("SM+leaky, per layer", "SM+leaky, shared")]
    limits = plots.slope_limits(runs)
    assert limits is not None
    axes = [plots.slope_curves(run, ax=Figure().subplots(), limits=limits) for run in runs]
    assert {ax.get_ylim() for ax in axes} == {limits}
    assert limits[0] < min(0, -0.09)
    assert limits[1] > 0.21


def test_a_slope_has_the_colour_of_its_layer(tmp_path: Path) -> None:
    figure = Figure()
    every, some = figure.subplots(2)
    plots.slope_curves(write_run(tmp_path, "SM+leaky, per layer"), ax=every)
    plots.slope_curves(write_run(tmp_path, "SM+G/leaky"), ax=some)
    colours = [line.get_color() for line in every.lines]
    assert [line.get_color() for line in some.lines[:2]] == [colours[1], colours[3]]


def test_a_slope_with_a_diverged_seed_is_nan_and_no_point(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, "SM+R"),
        write_run(tmp_path, "SM"),
        write_run(tmp_path, "SM", seed=1, status="diverged"),
    ]
    ax = Figure().subplots()
    plots.slope_perplexity(group_runs(runs), ax=ax)
    assert points(ax, 0)[0].tolist() == [0.0]
    assert texts(ax) == ["NaN (1/2)"]


def test_slopes_are_compared_on_the_seeds_that_all_of_them_have(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM+R", seed=seed, perplexity=ppl) for seed, ppl in enumerate((34.0, 30.0, 29.0))]
    runs.append(write_run(tmp_path, "SM", perplexity=44.0))
    ax = Figure().subplots()
    plots.slope_perplexity(group_runs(runs), ax=ax)
    assert [values.tolist() for values in points(ax, 0)] == [[0.0, 1.0], [34.0, 44.0]]
    (bars,) = ax.containers
    assert all(math.isnan(end) for segment in bars.lines[2][0].get_segments() for _, end in segment)  # one seed: no bar


def test_a_front_joins_the_points_of_one_corpus_only() -> None:
    ax = Figure().subplots()
    plots.trade_off(["a", "b", "c", "d"], [4, 3, 40, 30], [1, 2, 1, 2], [True] * 4, ["x", "x", "y", "y"], ax=ax)
    assert [points(ax, line)[1].tolist() for line in (0, 1)] == [[4, 3], [40, 30]]


def test_a_front_is_stairs_and_a_point_far_above_an_arrow_that_leaves_the_others_their_room() -> None:
    ax = Figure().subplots()
    plots.trade_off(list("abcde"), [90, 33, 32, 31, 30], [1, 2, 3, 4, 5], [True] * 5, ["x"] * 5, ax=ax)
    assert ax.lines[0].get_drawstyle() == "steps-post"
    assert ax.get_ylim()[1] < 40
    assert "a: 90.0" in texts(ax)
    assert [line.get_marker() for line in ax.lines].count("^") == 1


def test_a_trade_off_names_what_diverged_below_the_axes_and_draws_nothing_without_a_number() -> None:
    nan, names = math.nan, [f"SM+leaky, per layer (start{number})" for number in range(6)]
    ax = Figure().subplots()
    plots.trade_off(["SM+R", *names], [4.0, *[nan] * 6], [1.0] * 7, [True] * 7, ["x"] * 7, ax=ax)
    (told,) = (text for text in ax.texts if text.get_text().startswith("NaN"))
    assert told.get_position()[1] < 0
    assert all(len(line) <= 70 for line in told.get_text().splitlines())
    assert " ".join(told.get_text().split()) == "NaN: " + ", ".join(names)
    ax = Figure().subplots()
    plots.trade_off(names, [nan] * 6, [1.0] * 6, [False] * 6, ["x"] * 6, ax=ax)
    assert texts(ax) == ["no variant has a finite perplexity"]


@pytest.mark.parametrize("heights", [[], [0.2, 0.9], [0.5] * 3, [0.98, 0.99, 1.0], [0.1 * i / 3 for i in range(30)]])
def test_names_beside_points_do_not_cover_each_other(heights: list[float]) -> None:
    moved = apart(heights)
    row = min(0.05, 1 / max(1, len(heights)))
    assert all(low >= -1e-9 and high - low >= row - 1e-9 for low, high in itertools.pairwise(moved))
    assert max(moved, default=0) <= 1
    if heights == [0.2, 0.9]:
        assert moved == pytest.approx(heights)


def test_a_run_without_a_slope_says_so(tmp_path: Path) -> None:
    ax = plots.slope_curves(write_run(tmp_path, "SM+G"), ax=Figure().subplots())
    assert texts(ax) == ["no learnable slope in this run"]


def test_drawing_twice_gives_the_same_picture(tmp_path: Path) -> None:
    heads = final_heads(write_run(tmp_path, "SM+G"))
    assert heads is not None
    pictures = []
    for _ in range(2):
        figure = plots.heatmap(heads.entropy_LH, ceiling=heads.ceiling_L).get_figure(root=True)
        assert figure is not None
        file = io.BytesIO()
        figure.savefig(file, format="png")
        pictures.append(file.getvalue())
    assert pictures[0] == pictures[1]
