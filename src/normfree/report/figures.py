"""Which figures the report has, and the sentence that says how to read each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from normfree import plots, published
from normfree.analysis import (
    NORMALISERS,
    Group,
    Heads,
    causal_ceiling,
    final_heads,
    fixed_slope,
    is_over,
    pooled_ranges,
    probed_heads,
    recipes,
    shares_of_ceiling,
    slope_layers,
    slopes,
)
from normfree.cost import trade_off
from normfree.records import Run
from normfree.tables import has_slope

FIGURES = (
    "perplexity",
    "heatmaps",
    "published",
    "dynamics",
    "overload",
    "ranges",
    "losses",
    "nonfinite",
    "private-inference",
    "slope-trajectories",
    "slope-perplexity",
)
_MAXIMA = {"observed": "Of the highest head here", "log_t": "Of ln T", "causal": "Of the causal ceiling"}
_LINES_PER_PANEL = 6
_KEY_INCHES = 0.75


@dataclass(frozen=True)
class PageFigure:
    """Panels that belong together: flowing side by side on the page, one grid in the files."""

    name: str
    title: str
    caption: str
    panels: tuple[plots.Panel, ...]
    panel_inches: tuple[float, float] = (3.9, 2.9)
    columns: int = 2
    key: plots.Key | None = None

    def whole(self) -> Figure:
        """All panels and the colour bar in one figure."""
        return plots.panel_figure(self.panels, columns=self.columns, panel_inches=self.panel_inches, key=self.key)

    def parts(self) -> Iterator[Figure]:
        """One figure a panel."""
        for panel in self.panels:
            yield plots.panel_figure([panel], panel_inches=self.panel_inches)

    def key_part(self) -> Figure | None:
        """The colour bar alone."""
        if self.key is None:
            return None
        return plots.panel_figure([lambda ax: ax], panel_inches=(3.9, _KEY_INCHES), key=self.key)


def main_figures(groups: Sequence[Group]) -> list[PageFigure]:
    """The figures of index.html, without those that have nothing to show."""
    found = (
        _perplexity(groups),
        _heatmaps(groups),
        _published(groups),
        _dynamics(groups),
        _overload(groups),
        _ranges(groups),
        _losses(groups),
        _nonfinite(groups),
        _private_inference(groups),
    )
    return [figure for figure in found if figure is not None]


def slope_figures(groups: Sequence[Group]) -> list[PageFigure]:
    """The figures of slopes.html, without those that have nothing to show."""
    found = (_trajectories(groups), _slope_perplexity(groups))
    return [figure for figure in found if figure is not None]


def _perplexity(groups: Sequence[Group]) -> PageFigure | None:
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


def _heatmaps(groups: Sequence[Group]) -> PageFigure | None:
    measured = _measured(groups)
    if not measured:
        return None
    if len({group.members[0].spec["data"]["context"] for group, _ in measured}) == 1:
        ceiling, unit = max(float(heads.ceiling_L.max()) for _, heads in measured), "nats"
        shown, scale = [heads.entropy_LH for _, heads in measured], f"up to the causal ceiling of {ceiling:.2f} nats"
    else:  # blocks of several lengths
        ceiling, unit = 1.0, "share of the causal ceiling"
        shown, scale = [shares_of_ceiling(heads) for _, heads in measured], "in shares of each one's causal ceiling"
    early = [f"{group.name} (step {heads.step})" for group, heads in measured if heads.split != "final"]
    note = f" Taken from the newest probe, not from a final measurement: {', '.join(early)}." if early else ""
    return PageFigure(
        name="heatmaps",
        title="Entropy of every head",
        caption="One cell a head, layers downwards: bright cells attend almost evenly to all they may see, dark cells "
        "to few tokens; from the mark on, 3/4 of the causal ceiling, a head counts as near uniform. One colour scale, "
        f"{scale}; first seed of each variant, finished ones first.{note}",
        panels=tuple(
            partial(plots.entropy_heatmap, values_LH, ceiling=ceiling, title=group.name)
            for values_LH, (group, _) in zip(shown, measured, strict=True)
        ),
        panel_inches=_largest([values_LH.shape for values_LH in shown]),
        key=plots.entropy_key(ceiling, unit=unit),
    )


def _published(groups: Sequence[Group]) -> PageFigure | None:
    ceiling = causal_ceiling(published.HEATMAP_CONTEXT)
    panels, shapes = [], []
    for group, heads in _measured(groups):
        theirs = published.heatmaps().get(group.label)
        if theirs is not None and heads.split == "final" and published.is_gpt2(group.members[0].spec):
            drawn = partial(plots.entropy_heatmap, ceiling=1.0)
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
        panel_inches=_largest(shapes),
        key=plots.entropy_key(1.0, unit="share of the causal ceiling"),
    )


def _dynamics(groups: Sequence[Group]) -> PageFigure | None:
    shown = [(group, probes) for group in groups if group.shown and (probes := probed_heads(group.shown))]
    if not shown:
        return None
    layers = max(len(probes[-1].entropy_LH) for _, probes in shown)
    return PageFigure(
        name="dynamics",
        title="Entropy of the layers over training",
        caption="One line a layer, the mean of its heads, coloured by its depth. A line at the dashed causal ceiling "
        "is a layer whose heads attend evenly to all they may see, as untrained ones do; one near 0 is a layer "
        "whose heads all look at few tokens. A single head hides in the mean: the heatmaps show it. First finished "
        "seed of each variant, or of one that has none the first that diverged, else the first that is not finished.",
        panels=tuple(partial(plots.layer_dynamics, probes, title=group.name, layers=layers) for group, probes in shown),
        key=plots.colour_key(plots.LAYER_COLOURS, limit=(0, max(layers - 1, 1)), label="layer", whole=True),
    )


def _overload(groups: Sequence[Group]) -> PageFigure | None:
    chunks = _chunks([group for group in groups if any(probed_heads(run) for run in group.drawn)])
    if not chunks:
        return None
    styles = plots.variant_styles([group.name for group in groups])
    return PageFigure(
        name="overload",
        title="Heads near uniform",
        caption="Heads at or above 3/4 of the causal ceiling, in percent of all heads; one line a seed. "
        "Untrained heads are nearly uniform, so lines begin at the top. When a line comes down says little; where it "
        "ends is how many heads stay near uniform. The verdict of overload counts the first third of the layers only: "
        "the table below has them apart." + _open_ends(groups),
        panels=tuple(partial(plots.overload_curves, chunk, styles=styles) for chunk in chunks),
        panel_inches=plots.curves_size(chunks),
    )


def _ranges(groups: Sequence[Group]) -> PageFigure | None:
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


def _losses(groups: Sequence[Group]) -> PageFigure | None:
    chunks = _chunks(
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
        + _open_ends(groups),
        panels=tuple(panels),
        panel_inches=plots.curves_size(chunks),
    )


def rows_are_finite(groups: Sequence[Group]) -> bool:
    """Whether attention was probed, and no probe found a row with NaN or infinity."""
    counts = [value for group in groups for run in group.drawn for _, value in run.series("probe", "nonfinite_rows")]
    return bool(counts) and not any(sum(map(sum, rows_LH)) for rows_LH in counts)


def _nonfinite(groups: Sequence[Group]) -> PageFigure | None:
    chunks = _chunks([group for group in groups if any(run.series("probe", "nonfinite_rows") for run in group.drawn)])
    if not chunks or rows_are_finite(groups):
        return None
    styles = plots.variant_styles([group.name for group in groups])
    return PageFigure(
        name="nonfinite",
        title="Non-finite attention rows",
        caption="Rows of attention with NaN or infinity, in percent of all rows of a probe. A line that leaves 0 is a "
        "model that breaks; a cross at the top marks the step where a run diverged. The axis is logarithmic above 1 %. "
        "Such rows are counted here and are in no entropy." + _open_ends(groups),
        panels=tuple(partial(plots.nonfinite_curves, chunk, styles=styles) for chunk in chunks),
        panel_inches=plots.curves_size(chunks),
    )


def _trajectories(groups: Sequence[Group]) -> PageFigure | None:
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


def _private_inference(groups: Sequence[Group]) -> PageFigure | None:
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


def _slope_perplexity(groups: Sequence[Group]) -> PageFigure | None:
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


def _measured(groups: Sequence[Group]) -> list[tuple[Group, Heads]]:
    """What is drawn of each group: one run's heads."""
    return [(g, heads) for g in groups if g.shown and (heads := final_heads(g.shown)) is not None]


def _largest(shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    return plots.heatmap_size(max(shape[0] for shape in shapes), max(shape[1] for shape in shapes))


def _chunks(groups: Sequence[Group]) -> list[list[Group]]:
    """Few enough lines for one pair of axes; those of one label stay together where they fit."""
    found: list[list[Group]] = []
    for label in dict.fromkeys(group.label for group in groups):
        alike = [group for group in groups if group.label == label]
        size = math.ceil(len(alike) / math.ceil(len(alike) / _LINES_PER_PANEL))  # 7 are 4 and 3, not 6 and 1
        for piece in (alike[i : i + size] for i in range(0, len(alike), size)):
            if not found or len(found[-1]) + len(piece) > _LINES_PER_PANEL:
                found.append([])
            found[-1] += piece
    return found


def _family(chunk: Sequence[Group], chunks: Sequence[Sequence[Group]]) -> str:
    """What tells a panel from the others, for its title."""
    if len(chunks) == 1:
        return ""
    first, last = chunk[0].label, chunk[-1].label
    return f": {first}" if first == last else f": {first} to {last}"


def _open_ends(groups: Sequence[Group]) -> str:
    """A sentence for captions, where there is something to explain."""
    some = any(not is_over(run) for group in groups for run in group.drawn)
    return " An open circle ends the line of a run that is not finished." if some else ""


def _named(group: Group, run: Run) -> str:
    return f"{group.name}, seed {run.seed}" + ("" if is_over(run) else f" ({run.status})")


def _norm(group: Group) -> str:
    return group.runs[0].spec["model"].get("norm", "layernorm")


def _first_slope(run: Run) -> float:
    found = slopes(run)
    return round(found.first_S[0], 6) if found else 0.0
