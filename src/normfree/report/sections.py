"""SECTIONS: each part of the report with its title, figures and tables, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from normfree.analysis import published
from normfree.analysis.entropy import causal_ceiling, probed_heads, shares_of_ceiling, trained_heads
from normfree.analysis.groups import Group, all_runs, is_over, recipes
from normfree.analysis.series import recorded_quantities
from normfree.analysis.verdicts import fixed_slope, slope_layers
from normfree.cost.tradeoff import trade_off
from normfree.report.figure import PageFigure, cells_figure, curve_figure
from normfree.report.plots import curves, points
from normfree.report.plots.cells import cells_svg
from normfree.report.plots.heatmaps import DIFFERENCE_COLOURS, draw_cells, heatmap_key, heatmap_size
from normfree.report.plots.style import colour_key, variant_styles, wrapped
from normfree.report.quantity_figures import FIGURES, OPEN_FIGURES
from normfree.report.tables import cost, heads, history, results, runs
from normfree.report.tables.table import Table, without_empty_columns
from normfree.store.quantities import QUANTITIES

Groups = Sequence[Group]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page. It is left out if it has no figure and no table with a row."""

    name: str
    """Its anchor on the page."""
    title: str
    menu: str = ""
    """Its name in the menu, if that is shorter than the title."""
    figures: Sequence[Callable[[Groups], PageFigure | None]] = ()
    tables: Mapping[str, Callable[[Groups], Table]] = field(default_factory=dict)
    """By the name of their files."""
    measurements: bool = False
    """Whether it includes models that were only measured, besides those trained here."""
    folded: bool = True

    def members(self, groups: Groups) -> Groups:
        """The groups that belong in it."""
        return groups if self.measurements else [g for g in groups if g.members[0].kind == "run"]

    def draw(self, groups: Groups) -> list[PageFigure]:
        """Its figures."""
        members = self.members(groups)
        drawn = filter(None, (draw(members) for draw in self.figures))
        return [replace(f, name=f.name or self.name, title=f.title or self.title) for f in drawn]

    def make_tables(self, groups: Groups) -> list[Table]:
        """Its tables that have rows, without columns of dashes."""
        members = self.members(groups)
        return [without_empty_columns(table) for make in self.tables.values() if (table := make(members)).rows]


def sections_of(groups: Groups) -> list[Section]:
    """The sections of a report on these groups, open ones first: `SECTIONS` and one or two for every quantity."""
    open_ones, folded = [], []
    for quantity in recorded_quantities(groups, drawn="open") + recorded_quantities(groups, drawn="folded"):
        figures = FIGURES[quantity.axes]
        name, title = quantity.name, quantity.title
        if quantity.drawn == "open" and quantity.axes == ("layer", "head"):
            first = [partial(draw, quantity=quantity) for draw in OPEN_FIGURES]
            open_ones.append(Section(name=name, title=title, figures=first, measurements=True, folded=False))
            figures, name, title = figures[1:], f"{name}-training", f"{title} over training"
        drawings = [partial(draw, quantity=quantity) for draw in figures]
        folded.append(Section(name=name, title=title, figures=drawings, measurements=True))
    return [*SECTIONS[:1], *open_ones, *SECTIONS[1:-2], *folded, *SECTIONS[-2:]]


def figures_of(groups: Groups) -> list[PageFigure]:
    """Every figure of the page."""
    return [figure for section in sections_of(groups) for figure in section.draw(groups)]


def _perplexity(groups: Groups) -> PageFigure | None:
    with_runs = [group for group in groups if group.runs]
    if not with_runs:
        return None
    styles = variant_styles([group.name for group in groups])
    corpora = dict.fromkeys(group.runs[0].corpus for group in with_runs)
    of_corpus = [[group for group in with_runs if group.runs[0].corpus == corpus] for corpus in corpora]
    note = " Each corpus has its own panel, because perplexities on different text cannot be compared."
    differences = [
        (results.comparison(a, b), values, results.perplexity_difference(a, b))
        for a, b in results.main_pairs(with_runs)
        if (values := [a.perplexities[key] / b.perplexities[key] - 1 for key in a.perplexities.keys() & b.perplexities])
    ]
    panels = [partial(points.perplexity_points, some, styles=styles) for some in of_corpus]
    panels += [partial(points.difference_points, differences)] if differences else []
    rows = max(sum(2 + wrapped(name).count("\n") for name in names)
               for names in ([group.name for group in with_runs], [name for name, _, _ in differences]))  # fmt: skip
    return PageFigure(
        caption="Lower (further left) is better. A dot is a seed; the bar below is the mean with the sample standard "
        "deviation. NaN (k/n): k of n seeds diverged, so there is no mean. A number at the edge is a seed far above "
        f"the others. Differences: a dot is a pair of runs of one seed; the bar is the 95 % interval of their mean."
        f"{note if len(corpora) > 1 else ''}",
        panels=panels,
        panel_inches=(4.2, 0.8 + 0.14 * rows),
    )


def _published(groups: Groups) -> PageFigure | None:
    ceiling = causal_ceiling(published.HEATMAP_CONTEXT)
    named = []
    for group in groups:
        final = trained_heads(group.shown) if group.shown else None
        paper_LH = published.heatmaps().get(group.label)
        if group.shown and paper_LH is not None and final is not None and published.is_gpt2(group.members[0].spec):
            rows = group.shown.layer_numbers("entropy_nats", len(final.entropy_LH))
            named.append((f"{group.label}, paper's GPT-2 125M", paper_LH / ceiling, range(len(paper_LH))))
            named.append((f"{group.name}, ours", shares_of_ceiling(final), rows))
    if not named:
        return None
    return cells_figure(
        named,
        caption="Entropies as shares of each model's causal ceiling: 1 is uniform attention to all tokens up to "
        f"itself. Compare where the bright layers are, not single heads. {published.SOURCE}.",
        limits=(0, 1),
        key=heatmap_key(QUANTITIES["entropy_nats"], 1.0, unit="share of the ceiling"),
    )


def _overload(groups: Groups) -> PageFigure | None:
    return curve_figure(
        groups,
        curves.overload_curves,
        shown=probed_heads,
        caption="Heads at or above 3/4 of the causal ceiling, in percent of all heads; one line per seed. "
        "Untrained heads are nearly uniform, so lines begin at the top; what counts is where they end. The verdict of "
        "overload counts only the first third of the layers, which the table below shows separately.",
    )


def _losses(groups: Groups) -> PageFigure | None:
    return curve_figure(
        groups,
        [
            partial(curves.loss_curves, split="train", title="Training"),
            partial(curves.loss_curves, split="validation", title="Validation"),
        ],
        shown=lambda run: is_over(run) or run.series("train", "loss"),
        caption="Lower is better. Thin lines are seeds, thick lines their mean. The y axis excludes the first fifth "
        "of the training. The training loss is a running mean over about a fiftieth of the points. A cross at the top "
        "marks the step where a run diverged; the mean ends there.",
    )


def _nonfinite(groups: Groups) -> PageFigure | None:
    if runs.rows_are_finite(groups):
        return None
    return curve_figure(
        groups,
        curves.nonfinite_curves,
        shown=lambda run: run.series("probe", "nonfinite_rows"),
        caption="Rows of attention with NaN or infinity, in percent of all rows of a probe. They are in no entropy. A "
        "cross at the top marks the step where a run diverged. The axis is logarithmic above 1 %.",
    )


def _trajectories(groups: Groups) -> PageFigure | None:
    learning = [(g, run) for g in groups for run in g.drawn if run.series("probe", "negative_slope")]
    if not learning:
        return None
    layers = max((run.facts["model"]["layers"] for _, run in learning if slope_layers(run)), default=0)
    panels = []
    for group, run in learning:
        title = f"{group.name}, seed {run.seed}" + ("" if is_over(run) else f" ({run.status})")
        panels.append(partial(curves.slope_curves, run, title=title, layers=layers))
    key = colour_key(curves.LAYER_COLOURS, limit=(0, layers - 1), label="layer", whole=True) if layers > 1 else None
    return PageFigure(
        name="slope-trajectories",
        title="Learnable slopes over training",
        caption="One line per layer, coloured by depth, or one grey line if all layers share a slope. The straight "
        "line at 0 is ReLU. The table below says which slopes end near it.",
        panels=panels,
        key=key,
    )


def _slope_perplexity(groups: Groups) -> PageFigure | None:
    fixed = [g for g in groups if g.runs and runs.has_slope(g.runs[0]) and fixed_slope(g.runs[0]) is not None]
    if not fixed or not any(runs.has_negative_slope(run) for run in all_runs(groups)):
        return None
    recipe_of = {name: recipe for recipe, names in recipes(fixed).items() for name in names}
    panels: dict[tuple[str, str], list[Group]] = {}
    for group in fixed:
        norm = group.runs[0].spec["model"].get("norm", "layernorm")
        panels.setdefault((recipe_of[group.name], norm), []).append(group)
    return PageFigure(
        name="slope-perplexity",
        title="Perplexity over fixed slopes",
        caption="Slope 0 is ReLU and 1 the identity; without LayerNorm unless a panel names its norm. Means over "
        "the seeds that all slopes share, or over a slope's own if they share none; bars are the sample deviation. "
        "NaN (k/n): k of n seeds have no finite perplexity.",
        panels=[
            partial(points.slope_perplexity, some, title=", ".join(filter(None, (recipe, norm.replace("none", "")))))
            for (recipe, norm), some in sorted(panels.items(), key=lambda panel: panel[0])
        ],
    )


def _slopes(groups: Groups) -> Table:
    return runs.slope_table(groups if any(runs.has_negative_slope(run) for run in all_runs(groups)) else [])


def _private_inference(groups: Groups) -> PageFigure | None:
    priced, _ = trade_off(groups)
    if not priced:
        return None
    longest = max(len(point.name) for point in priced)
    return PageFigure(
        caption="One point per variant: bytes sent in one forward pass over one block under CHEETAH, and perplexity "
        "(the table says over which seeds). Further left and lower is better. Circles are on the Pareto front, "
        "crosses are not; the line joins the front of one corpus. An arrow at the top is a variant far above the "
        "others, with its perplexity. Read differences between variants, not totals (docs/private-inference.md).",
        panels=[partial(points.trade_off_points, priced)],
        panel_inches=(5.8 + 0.06 * max(0, longest - 25), max(2.9, 0.8 + 0.17 * len(priced))),
    )


def _difference(groups: Groups) -> PageFigure | None:
    """Every quantity of the heads of two models, as the first minus the second."""
    if len(groups) != 2:
        return None
    first, second = groups
    panels, drawings, shapes = [], [], []
    for quantity in (q for drawn in ("open", "folded") for q in recorded_quantities(groups, drawn=drawn)):
        if quantity.axes == ("layer", "head") and (pair := heads.head_pair(groups, quantity.name)) is not None:
            difference_LH = pair[0] - pair[1]
            limit = float(np.nanmax(np.abs(difference_LH), initial=0.0)) or 1.0
            title = f"{quantity.label}: up to {limit:.2f}"
            scale = {"colours": DIFFERENCE_COLOURS, "numbers": pair[2], "title": title}
            panels.append(partial(draw_cells, difference_LH, lowest=-limit, highest=limit, **scale))
            drawings.append(cells_svg(difference_LH, limits=(-limit, limit), **scale))
            shapes.append(difference_LH.shape)
    if not panels:
        return None
    return PageFigure(
        caption=f"{first.name} minus {second.name}. Red: higher in the first. Blue: higher in the second. Each "
        "panel has its own scale, up to the largest difference, which its title gives.",
        panels=panels,
        panel_inches=heatmap_size(*shapes),
        key=colour_key(DIFFERENCE_COLOURS, limit=(-1, 1), label="share of the largest difference"),
        drawings=drawings,
    )


SECTIONS: tuple[Section, ...] = (
    Section(name="perplexity", title="Final perplexity", menu="Perplexity", figures=[_perplexity], folded=False),
    Section(name="claims", title="The paper's claims", menu="Claims", tables={"claims": results.claim_table},
            folded=False),
    Section(name="difference", title="Two models, head by head", menu="Difference", figures=[_difference],
            tables={"movers": heads.mover_table}, measurements=True, folded=False),
    Section(name="tables", title="Perplexity and differences in numbers", menu="Numbers",
            tables={"perplexity": results.perplexity_table, "differences": results.difference_table,
                    "gap": history.gap_table}),
    Section(name="published", title="The paper's heads beside ours", menu="Beside the paper", figures=[_published]),
    Section(name="overload", title="Heads near uniform", menu="Near uniform", figures=[_overload],
            tables={"overload": history.overload_table}),
    Section(name="ranges", title="Heads per range of entropy", menu="Ranges",
            tables={"ranges": results.range_table}, measurements=True),
    Section(name="losses", title="Loss", figures=[_losses]),
    Section(name="nonfinite", title="Non-finite attention rows", menu="Non-finite", figures=[_nonfinite]),
    Section(name="private-inference", title="Perplexity against communication in private inference",
            menu="Private inference", figures=[_private_inference],
            tables={"perplexity-communication": cost.trade_off_table}),
    Section(name="slopes", title="Slopes below zero", menu="Slopes", figures=[_trajectories, _slope_perplexity],
            tables={"slopes": _slopes}),
    Section(name="layers", title="Layers and extreme heads", menu="Layers",
            tables={"layers": heads.layer_table, "heads": heads.extreme_head_table}, measurements=True),
    Section(name="verdicts", title="Verdicts", tables={"verdicts": runs.verdict_table}, measurements=True),
    Section(name="runs", title="Runs", tables={"runs": runs.run_table}),
)  # fmt: skip
