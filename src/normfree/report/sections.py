"""SECTIONS: each part of the report with its title, figures and tables, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from normfree.analysis import published
from normfree.analysis.entropy import NORMALISERS, causal_ceiling, final_heads, probed_heads, shares_of_ceiling
from normfree.analysis.groups import Group, is_over, recipes
from normfree.analysis.quantities import recorded_quantities
from normfree.analysis.ranges import pooled_ranges
from normfree.analysis.verdicts import fixed_slope, slope_layers, slopes
from normfree.cost import trade_off
from normfree.report import plots, tables
from normfree.report.figure import PageFigure, chunks_of, largest, open_ends
from normfree.report.plots.heatmaps import DIFFERENCE_COLOURS
from normfree.report.quantities import quantity_figures
from normfree.report.tables import Table, has_slope
from normfree.store.quantities import QUANTITIES, Quantity
from normfree.store.runs import Run

Groups = Sequence[Group]
_MAXIMA = {"observed": "Of the highest head here", "log_t": "Of ln T", "causal": "Of the causal ceiling"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page. It is left out where it has no figure, no row and no note."""

    name: str
    """Its anchor on the page."""
    title: str
    menu: str = ""
    """Its name in the menu, where that is shorter than the title."""
    figures: Callable[[Groups], Sequence[PageFigure | None]] = lambda _groups: ()
    tables: Mapping[str, Callable[[Groups], Table]] = field(default_factory=dict)
    """By the name of their files."""
    note: Callable[[Groups], str] = lambda _groups: ""
    """A sentence for what a figure need not show."""
    measurements: bool = False
    """Whether models that were only measured belong in it, beside those trained here."""
    folded: bool = False
    page: str = "index"


def sections_of(groups: Groups) -> list[Section]:
    """The sections of a report on these groups: `SECTIONS`, with those of every recorded quantity among them."""
    open_ones, folded = (
        [
            Section(
                name=quantity.name,
                title=quantity.title,
                figures=partial(_figures_of, quantity=quantity),
                measurements=True,
                folded=drawn == "folded",
            )
            for quantity in recorded_quantities(groups, drawn=drawn)
        ]
        for drawn in ("open", "folded")
    )
    return [*SECTIONS[:1], *open_ones, *SECTIONS[1:-2], *folded, *SECTIONS[-2:]]


def figures_of(groups: Groups, page: str = "index") -> Iterator[PageFigure]:
    """Every figure of a page."""
    for section in sections_of(groups):
        if section.page == page:
            yield from filter(None, section.figures(members_of(section, groups)))


def members_of(section: Section, groups: Groups) -> Groups:
    """The groups that a section is about."""
    return groups if section.measurements else [g for g in groups if g.members[0].kind == "run"]


def _figures_of(groups: Groups, quantity: Quantity) -> list[PageFigure]:
    return quantity_figures(groups, quantity)


def _perplexity(groups: Groups) -> PageFigure | None:
    corpora: dict[str, list[Group]] = {}
    for group in groups:
        if group.runs:
            corpora.setdefault(group.runs[0].corpus, []).append(group)
    if not corpora:
        return None
    styles = plots.variant_styles([group.name for group in groups])
    apart = " Each corpus has a panel: its perplexities compare with no other's." if len(corpora) > 1 else ""
    return PageFigure(
        name="perplexity",
        title="Final perplexity of every seed",
        caption="Lower is better, so further left. A dot is a seed, the bar below it the mean and the sample standard "
        "deviation over n seeds. NaN (k/n) means that k of n seeds diverged: then there is no mean. An arrow at the "
        f"edge is a seed far above the others, with its perplexity.{apart}",
        panels=tuple(partial(plots.perplexity_points, of_corpus, styles=styles) for of_corpus in corpora.values()),
        panel_inches=plots.perplexity_points_size([group.name for group in groups if group.runs]),
    )


def _published(groups: Groups) -> PageFigure | None:
    ceiling = causal_ceiling(published.HEATMAP_CONTEXT)
    panels, shapes = [], []
    for group in groups:
        heads = None if group.shown is None else final_heads(group.shown)
        theirs = published.heatmaps().get(group.label)
        if (
            theirs is not None
            and heads is not None
            and heads.split == "final"
            and published.is_gpt2(group.members[0].spec)
        ):
            drawn = partial(plots.heatmap, ceiling=1.0)
            panels.append(partial(drawn, theirs / ceiling, title=f"{group.label}, paper's GPT-2 125M"))
            panels.append(partial(drawn, shares_of_ceiling(heads), title=f"{group.name}, ours"))
            shapes += [theirs.shape, heads.entropy_LH.shape]
    if not panels:
        return None
    return PageFigure(
        name="published",
        title="The paper's heads beside ours",
        caption="Entropies as shares of each model's own causal ceiling, so that 1 means evenly spread over "
        f"the past in both; compare where the bright layers lie, not single heads. {published.SOURCE}.",
        panels=tuple(panels),
        panel_inches=largest(shapes),
        key=plots.heatmap_key(QUANTITIES["entropy_nats"], 1.0, unit="share of the ceiling"),
    )


def _overload(groups: Groups) -> PageFigure | None:
    chunks = chunks_of([group for group in groups if any(probed_heads(run) for run in group.drawn)])
    if not chunks:
        return None
    styles = plots.variant_styles([group.name for group in groups])
    return PageFigure(
        name="overload",
        title="Heads near uniform",
        caption="Heads at or above 3/4 of the causal ceiling, in percent of all heads; one line a seed. "
        "Untrained heads are nearly uniform, so lines begin at the top. When a line comes down says little; where it "
        "ends is how many heads stay near uniform. The verdict of overload counts the first third of the layers only: "
        "the table below has them apart." + open_ends(groups),
        panels=tuple(partial(plots.overload_curves, chunk, styles=styles) for chunk in chunks),
        panel_inches=plots.curves_size(chunks),
    )


def _ranges(groups: Groups) -> PageFigure | None:
    pooled = pooled_ranges(groups)
    if not pooled:
        return None
    bars = {
        normaliser: {name: found.counts for name, found in by_group.items()} for normaliser, by_group in pooled.items()
    }
    return PageFigure(
        name="ranges",
        title="Heads per range of entropy",
        caption="Share of the heads of all seeds that were measured after training in each quarter of the maximum; a "
        "long bright piece is many heads near uniform. The maximum, in the order of the panels and as the "
        f"table calls it: {'; '.join(f'{normaliser}, {NORMALISERS[normaliser]}' for normaliser in bars)}.",
        panels=tuple(
            partial(plots.range_bars, counts, title=_MAXIMA[normaliser]) for normaliser, counts in bars.items()
        ),
        panel_inches=plots.range_bars_size(bars["causal"]),
        columns=3,
    )


def _losses(groups: Groups) -> PageFigure | None:
    chunks = chunks_of(
        [group for group in groups if group.runs or any(run.series("train", "loss") for run in group.drawn)]
    )
    if not chunks:
        return None
    styles = plots.variant_styles([group.name for group in groups])
    panels = [
        partial(plots.loss_curves, chunk, split=split, styles=styles, title=f"{words}{_family(chunk, chunks)}")
        for chunk in chunks
        for split, words in (("train", "Training"), ("validation", "Validation"))
    ]
    return PageFigure(
        name="losses",
        title="Loss",
        caption="Lower is better. A thin line is a seed, the other its variant's mean. The y axis leaves "
        "out the losses of the first fifth of the training. The training loss is a running mean over about a fiftieth "
        "of the points; a cross at the top marks the step where a run diverged, and the mean ends there."
        + open_ends(groups),
        panels=tuple(panels),
        panel_inches=plots.curves_size(chunks),
    )


def _finite_rows(groups: Groups) -> str:
    return "No probe of any run found an attention row with NaN or infinity." if _rows_are_finite(groups) else ""


def _rows_are_finite(groups: Groups) -> bool:
    """Whether attention was probed, and no probe found a row with NaN or infinity."""
    counts = [value for group in groups for run in group.drawn for _, value in run.series("probe", "nonfinite_rows")]
    return bool(counts) and not any(sum(map(sum, rows_LH)) for rows_LH in counts)


def _nonfinite(groups: Groups) -> PageFigure | None:
    chunks = chunks_of([group for group in groups if any(run.series("probe", "nonfinite_rows") for run in group.drawn)])
    if not chunks or _rows_are_finite(groups):
        return None
    styles = plots.variant_styles([group.name for group in groups])
    return PageFigure(
        name="nonfinite",
        title="Non-finite attention rows",
        caption="Rows of attention with NaN or infinity, in percent of all rows of a probe. A line that leaves 0 is a "
        "model that breaks; a cross at the top marks the step where a run diverged. The axis is logarithmic above 1 %. "
        "Such rows are counted here and are in no entropy." + open_ends(groups),
        panels=tuple(partial(plots.nonfinite_curves, chunk, styles=styles) for chunk in chunks),
        panel_inches=plots.curves_size(chunks),
    )


def _trajectories(groups: Groups) -> PageFigure | None:
    learning = [(g, run) for g in groups for run in g.drawn if run.series("probe", "negative_slope")]
    if not learning:
        return None
    layers = max((run.facts["model"]["layers"] for _, run in learning if slope_layers(run)), default=0)
    alike: dict[float, list[Run]] = {}
    for _, run in learning:
        alike.setdefault(_first_slope(run), []).append(run)
    limits = {first: plots.slope_limits(of_first) for first, of_first in alike.items()}
    return PageFigure(
        name="slope-trajectories",
        title="Learnable slopes over training",
        caption="One line a layer, coloured by its depth, or one grey line for a slope that all layers share. The "
        "straight line at 0 is ReLU: a slope that ends on it has found ReLU again, one that crosses it has gone past; "
        "the table above says which end near it. Runs that start from the same slope have the same y axis.",
        panels=tuple(
            partial(plots.slope_curves, run, title=_named(group, run), layers=layers, limits=limits[_first_slope(run)])
            for group, run in learning
        ),
        key=plots.colour_key(plots.LAYER_COLOURS, limit=(0, layers - 1), label="layer", whole=True)
        if layers > 1
        else None,
    )


def _private_inference(groups: Groups) -> PageFigure | None:
    points = trade_off(groups).points
    if not points:
        return None
    labels, perplexity = [point.name for point in points], [point.perplexity for point in points]
    gigabytes, front = [point.bytes / 1e9 for point in points], [point.on_front for point in points]
    corpora = [point.corpus for point in points]
    return PageFigure(
        name="private-inference",
        title="Perplexity against communication in private inference",
        caption="Lower left is better: what one forward pass would send under CHEETAH, from its operations alone "
        "(docs/private-inference.md). The stairs join the Pareto front, circles: nothing on the same corpus is as good "
        "in both and better in one. An arrow at the top is a variant far above the others. Read differences between "
        "variants, not totals. GELU is priced in the form the model computes.",
        panels=(partial(plots.trade_off, labels, perplexity, gigabytes, front, corpora),),
        panel_inches=plots.trade_off_size(labels),
    )


def _slope_perplexity(groups: Groups) -> PageFigure | None:
    fixed = [g for g in groups if g.runs and has_slope(g.runs[0]) and fixed_slope(g.runs[0]) is not None]
    if not fixed:
        return None
    texts = {name: text for text, names in recipes(fixed).items() for name in names}
    settings = {(texts[group.name], _norm(group)) for group in fixed}
    return PageFigure(
        name="slope-perplexity",
        title="Perplexity over fixed slopes",
        caption="0 is ReLU and 1 the identity; without LayerNorm, but where a panel is named by its norm. Means over "
        "the seeds that all slopes have, or over a slope's own where none is common; bars are the sample deviation, "
        "and NaN (k/n) means that k of n seeds have no finite perplexity.",
        panels=tuple(
            partial(
                plots.slope_perplexity,
                [group for group in fixed if (texts[group.name], _norm(group)) == (recipe, norm)],
                title=", ".join(filter(None, (recipe, "" if norm == "none" else norm))),
            )
            for recipe, norm in sorted(settings)
        ),
    )


def _family(chunk: Sequence[Group], chunks: Sequence[Sequence[Group]]) -> str:
    """What tells a panel from the others, for its title."""
    if len(chunks) == 1:
        return ""
    first, last = chunk[0].label, chunk[-1].label
    return f": {first}" if first == last else f": {first} to {last}"


def _named(group: Group, run: Run) -> str:
    return f"{group.name}, seed {run.seed}" + ("" if is_over(run) else f" ({run.status})")


def _norm(group: Group) -> str:
    return group.runs[0].spec["model"].get("norm", "layernorm")


def _first_slope(run: Run) -> float:
    found = slopes(run)
    return round(found.first_S[0], 6) if found else 0.0


def _difference(groups: Groups) -> list[PageFigure | None]:
    """Every number a head that both of two models have, as the first less the second."""
    if len(groups) != 2:
        return []
    panels, shapes, limits = [], [], []
    first, second = groups
    quantities = [q for where in ("open", "folded") for q in recorded_quantities(groups, drawn=where)]
    for quantity in quantities:
        if quantity.axes == ("layer", "head") and (pair := tables.head_pair(groups, quantity.name)) is not None:
            difference_LH, layers = pair
            limit = float(np.nanmax(np.abs(difference_LH), initial=0.0)) or 1.0
            draw = partial(plots.difference_heatmap, difference_LH, limit=limit, layers=layers)
            panels.append(partial(draw, title=f"{quantity.label}: up to {limit:.2f}"))
            shapes.append(difference_LH.shape)
            limits.append(limit)
    if not panels:
        return []
    return [
        PageFigure(
            name="difference",
            title=f"{first.name} less {second.name}, head by head",
            caption="Red: higher in the first. Blue: higher in the second. Each panel has a scale of its own, up to "
            "the largest difference, which its title gives.",
            panels=tuple(panels),
            panel_inches=largest(shapes),
            key=plots.colour_key(DIFFERENCE_COLOURS, limit=(-1, 1), label="share of the largest difference"),
        )
    ]


SECTIONS: tuple[Section, ...] = (
    Section(name="perplexity", title="Perplexity", figures=lambda groups: [_perplexity(groups)],
            tables={"perplexity": tables.perplexity_table, "differences": tables.difference_table,
                    "gap": tables.gap_table, "claims": tables.claim_table}),
    Section(name="difference", title="Two models, head by head", menu="Difference", figures=_difference,
            tables={"movers": tables.mover_table}, measurements=True),
    Section(name="published", title="The paper's heads beside ours", menu="Beside the paper",
            figures=lambda groups: [_published(groups)]),
    Section(name="overload", title="Heads near uniform", menu="Near uniform",
            figures=lambda groups: [_overload(groups)], tables={"overload": tables.overload_table}),
    Section(name="ranges", title="Heads per range of entropy", menu="Ranges", figures=lambda groups: [_ranges(groups)],
            tables={"ranges": tables.range_table}, measurements=True),
    Section(name="losses", title="Loss", figures=lambda groups: [_losses(groups)]),
    Section(name="nonfinite", title="Non-finite attention rows", menu="Non-finite",
            figures=lambda groups: [_nonfinite(groups)]),
    Section(name="private-inference", title="Perplexity against communication in private inference",
            menu="Private inference", figures=lambda groups: [_private_inference(groups)],
            tables={"perplexity-communication": lambda groups: tables.trade_off_table(trade_off(groups))}),
    Section(name="slopes", title="Slope and perplexity", tables={"slopes": tables.slope_table}, page="slopes"),
    Section(name="slope-trajectories", title="Learnable slopes over training",
            figures=lambda groups: [_trajectories(groups)], page="slopes"),
    Section(name="slope-perplexity", title="Perplexity over fixed slopes",
            figures=lambda groups: [_slope_perplexity(groups)], page="slopes"),
    Section(name="layers", title="Layers and extreme heads", menu="Layers",
            tables={"layers": tables.layer_table, "heads": tables.extreme_head_table}, measurements=True),
    Section(name="verdicts", title="Verdicts", tables={"verdicts": tables.verdict_table}, note=_finite_rows,
            measurements=True),
    Section(name="runs", title="Runs", tables={"runs": tables.run_table}),
)  # fmt: skip
