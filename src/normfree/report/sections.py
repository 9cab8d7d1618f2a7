"""SECTIONS: each part of the report with its title, figures and tables, in the order of the page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from normfree.analysis import entropy, published
from normfree.analysis.groups import Group, all_runs, score_of
from normfree.analysis.pairs import main_pairs
from normfree.cost.totals import trade_off
from normfree.report import figures
from normfree.report.figures import PageFigure, heatmap_figure, seed_figure
from normfree.report.plots import curves, points
from normfree.report.plots.style import variant_styles, wrapped
from normfree.report.tables import cost, results, runs, tasks
from normfree.report.tables.table import Table, without_empty_columns
from normfree.store.quantities import QUANTITIES

Groups = Sequence[Group]
_SPLITS = {"train": "Training", "validation": "Validation"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page. It is left out if it has no figure and no table with a row."""

    name: str  # its anchor on the page
    title: str
    menu: str = ""  # its name in the menu, if that is shorter than the title
    figures: Sequence[Callable[[Groups], PageFigure | None]] = ()
    tables: Mapping[str, Callable[[Groups], Table]] = field(default_factory=dict)  # by the name of their files
    measurements: bool = False  # whether it includes models that were only measured, besides those trained here
    folded: bool = True

    def contents(self, groups: Groups, prefix: str = "") -> tuple[list[PageFigure], list[Table]]:
        """Its figures, and its tables that have rows, without columns of dashes; names begin with the prefix."""
        if not self.measurements:
            groups = [group for group in groups if group.is_trained]
        figures = filter(None, (draw(groups) for draw in self.figures))
        tables = (without_empty_columns(make(groups)) for make in self.tables.values())
        return (
            [replace(f, name=prefix + (f.name or self.name), title=f.title or self.title) for f in figures],
            [replace(table, name=prefix + table.name) for table in tables if table.rows],
        )


def sections_of(groups: Groups) -> list[Section]:
    """The sections of a report on these groups, open ones first: `SECTIONS` and one or two for every quantity."""
    open_ones, folded = [], []
    quantities = [each for drawn in ("open", "folded") for each in entropy.recorded_quantities(groups, drawn=drawn)]
    for quantity in quantities:
        name, title = quantity.name, quantity.title
        draws = [partial(draw, quantity=quantity) for draw in figures.FIGURES[quantity.axes]]
        if quantity.drawn == "open" and quantity.axes == ("layer", "head"):
            open_ones.append(Section(name=name, title=title, figures=draws[:-1], measurements=True, folded=False))
            draws, name, title = draws[-1:], f"{name}-training", f"{title} over training"
        folded.append(Section(name=name, title=title, figures=draws, measurements=True))
    words = {"score": (name := score_of(groups).name), "Score": name.capitalize()}
    named = ("name", "title", "menu")
    sections = [replace(s, **{part: getattr(s, part).format(**words) for part in named}) for s in SECTIONS]
    return [*sections[:1], *open_ones, *sections[1:-2], *folded, *sections[-2:]]


def figures_of(groups: Groups) -> list[PageFigure]:
    return [figure for section in sections_of(groups) for figure in section.contents(groups)[0]]


def _scores(groups: Groups) -> PageFigure | None:
    with_runs = [group for group in groups if group.runs]
    if not with_runs:
        return None
    pairs, names = main_pairs(with_runs), [group.name for group in groups]
    panels = [partial(points.score_points, with_runs, styles=variant_styles(names))]
    panels += [partial(points.difference_points, pairs)] if pairs else []
    direction = "Higher (further right)" if score_of(with_runs).higher_is_better else "Lower (further left)"
    rows = max(sum(2 + wrapped(name).count("\n") for name in axis) for axis in (names, [pair.name for pair in pairs]))
    return PageFigure(
        caption=f"{direction} is better. A dot is a seed; the bar below is the mean with the sample standard "
        "deviation. Differences: a dot is a pair of runs of one seed; the bar is the 95 % interval of their mean.",
        panels=panels,
        panel_inches=(4.2, 0.8 + 0.14 * rows),
    )


def _published(groups: Groups) -> PageFigure | None:
    ceiling = entropy.causal_ceiling(published.HEATMAP_CONTEXT)
    titled = []
    for group in groups:
        final = entropy.trained_heads(group.heatmap_run)
        paper_LH = published.heatmaps().get(group.label)
        if final is not None and paper_LH is not None and published.is_gpt2(group.members[0].spec):
            titled.append((f"{group.label}, paper's GPT-2 125M", paper_LH / ceiling, range(len(paper_LH))))
            titled.append((f"{group.name}, ours", entropy.shares_of_ceiling(final), final.layers))
    return heatmap_figure(
        titled,
        label="Entropy (share of the ceiling)",
        limit=1.0,
        mark=QUANTITIES["entropy_nats"].mark,
        caption="Entropies as shares of each model's causal ceiling: 1 is uniform attention to all tokens up to "
        f"itself. Compare where the bright layers are, not single heads. {published.SOURCE}.",
    )


def _overload(groups: Groups) -> PageFigure | None:
    ceiling = entropy.ceiling_words(all_runs(groups))
    from_random = all(run.spec.get("start_name", "random") == "random" for run in all_runs(groups))
    begin = "Untrained heads are nearly uniform, so lines begin at the top; what counts is where they end. "
    return seed_figure(
        groups,
        curves.overload_series,
        draws=[partial(curves.seed_curves, series=curves.overload_series, label="heads in the top quarter (%)")],
        caption=f"Heads at or above 3/4 of the {ceiling}, in percent of all heads. "
        f"{begin if from_random else ''}The verdict of overload counts only the "
        "first third of the layers in each group of heads.",
    )


def _losses(groups: Groups) -> PageFigure | None:
    return seed_figure(
        groups,
        partial(curves.loss_series, split="train"),
        draws=[partial(curves.loss_curves, split=split, title=title) for split, title in _SPLITS.items()],
        caption="Lower is better. The y axis excludes the first fifth of the training. The training loss is a running "
        "mean over about a fiftieth of the points. A cross at the top marks the step where a run diverged.",
    )


def _nonfinite(groups: Groups) -> PageFigure | None:
    return None if runs.rows_are_finite(groups) else figures.curves(groups, QUANTITIES["nonfinite_rows"])


def _private_inference(groups: Groups) -> PageFigure | None:
    priced, _ = trade_off(groups)
    if not priced:
        return None
    lines = [line for point in priced for line in wrapped(point.name, points.NAME_LETTERS).split("\n")]
    return PageFigure(
        caption="One point per variant: bytes sent in one forward pass over one block under CHEETAH, and perplexity "
        "(the table says over which seeds). Further left and lower is better. Circles are on the Pareto front, "
        "crosses are not; the line joins the front of one corpus. Read differences between variants, not totals "
        "(docs/private-inference.md).",
        panels=[partial(points.trade_off_points, priced)],
        panel_inches=(2.8 + 0.06 * max(map(len, lines)), max(2.9, 0.8 + 0.15 * len(lines))),
    )


SECTIONS: tuple[Section, ...] = (
    Section(name="{score}", title="Final {score}", menu="{Score}", figures=[_scores], folded=False),
    Section(name="claims", title="The paper's claims", menu="Claims",
            tables={"claims": results.claim_table}, folded=False),
    Section(name="tables", title="{Score} and differences in numbers", menu="Numbers",
            tables={"perplexity": results.score_table, "differences": results.difference_table,
                    "gap": results.gap_table}),
    Section(name="published", title="The paper's heads beside ours", menu="Beside the paper", figures=[_published]),
    Section(name="overload", title="Heads near uniform", menu="Near uniform", figures=[_overload],
            tables={"overload": results.overload_table}),
    Section(name="ranges", title="Heads per range of entropy", menu="Entropy ranges",
            tables={"ranges": results.range_table}, measurements=True),
    Section(name="tasks", title="What the models can do", menu="Tasks", tables={"tasks": tasks.task_table},
            measurements=True),
    Section(name="losses", title="Loss", figures=[_losses]),
    Section(name="nonfinite", title="Non-finite attention rows", menu="Non-finite", figures=[_nonfinite]),
    Section(name="private-inference", title="Perplexity against communication in private inference",
            menu="Private inference", figures=[_private_inference],
            tables={"perplexity-communication": cost.trade_off_table}),
    Section(name="slopes", title="Slopes below zero", menu="Slopes",
            figures=[partial(figures.layers_over_training, quantity=QUANTITIES["negative_slope"])],
            tables={"slopes": runs.slope_table}),
    Section(name="layers", title="Layers and extreme heads", menu="Layers",
            measurements=True,
            tables={"layers": runs.layer_table, "heads": runs.extreme_head_table}),
    Section(name="verdicts", title="Verdicts", tables={"verdicts": runs.verdict_table}, measurements=True),
    Section(name="runs", title="Runs", tables={"runs": runs.run_table}),
)  # fmt: skip
