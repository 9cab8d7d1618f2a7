"""Tables of runs: their layers and heads, verdicts, time and speed, slopes."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np

from normfree.analysis.entropy import (
    OVERLOAD_SHARE,
    Heads,
    final_heads,
    layer_means,
    newest_values,
    probed_heads,
    recorded_quantities,
    shares_of_ceiling,
)
from normfree.analysis.groups import Group, all_runs
from normfree.analysis.seeds import decimals, summarise
from normfree.analysis.verdicts import (
    COLLAPSE_NATS,
    SLOPE_NEAR_ZERO,
    SLOPE_SPREAD,
    WORDS,
    collapse,
    fixed_slope,
    only_activation,
    overload,
    slopes,
)
from normfree.report.tables.table import Table
from normfree.report.views import compare
from normfree.store.progress import duration
from normfree.store.runs import Run, divergence_text

_MANY_RUNS = 24


def verdict_table(groups: Sequence[Group]) -> Table:
    """Overload, collapse and slopes of every run; of many runs, how often each verdict holds in every variant."""
    notes = [
        f"Overload: at least half of the heads in the first third of the layers are at or above "
        f"{100 * OVERLOAD_SHARE:.0f} % of the causal ceiling. Untrained heads are nearly uniform, so a "
        "run may begin overloaded.",
        f"Collapse: a head below {COLLAPSE_NATS} nats.",
        f"Slopes: apart if the highest is {SLOPE_SPREAD} or more above the lowest.",
        "Undecided: some heads are NaN and could change the verdict. Layers and heads count from 0.",
    ]
    if rows_are_finite(groups):
        notes.append("No probe of any run found an attention row with NaN or infinity.")
    if len(all_runs(groups)) > _MANY_RUNS:
        titles = ("Variant", "Overload", "Collapse", "Slopes apart", "Runs")
        rows = [(group.name, *_verdict_counts(group.members), str(len(group.members))) for group in groups]
        return Table("verdicts", "Verdicts on every variant", titles, rows, notes, words=titles[1:4])
    rows = []
    for run in all_runs(groups):
        verdicts = ("-", "not measured", "not measured", "-")
        if heads := final_heads(run):
            probes = probed_heads(run)
            verdicts = (str(heads.step), f"{overload(heads, probes)}", f"{collapse(heads, probes)}", _slope_text(run))
        rows.append((run.place, *verdicts))
    titles = ("Run", "Measured at step", "Overload", "Collapse", "Slopes")
    return Table("verdicts", "Verdicts on every run", titles, rows, notes, words=titles[2:])


def _verdict_counts(runs: Sequence[Run]) -> list[str]:
    """Overload, collapse and slopes apart, each as `yes`, `no`, or `4 yes, 1 undecided`."""
    heads = [measured for run in runs if (measured := final_heads(run))]
    verdicts = (
        [overload(measured).holds for measured in heads],
        [collapse(measured).holds for measured in heads],
        [learned.are_apart for run in runs if (learned := slopes(run))],
    )
    counts = (Counter(WORDS[holds] for holds in of_runs) for of_runs in verdicts)
    return [", ".join(f"{n} {word}" if len(c) > 1 else word for word, n in c.items()) or "-" for c in counts]


def run_table(groups: Sequence[Group]) -> Table:
    """Status, perplexity, steps, tokens, time and speed of every run."""
    rows = []
    for run in all_runs(groups):
        speeds = [v for _, v in run.series("train", "tokens_per_second") if math.isfinite(v)]
        status = run.status
        if divergence := run.facts.get("divergence"):
            status += f": {divergence_text(divergence)}"
        if skipped := run.facts.get("skipped_steps"):
            status += f", {len(skipped)} non-finite steps skipped (first: {skipped[0]['step']})"
        perplexity = decimals(run.perplexity) if run.status == "finished" else "-"
        time = duration(run.facts.get("wall_seconds") or math.nan)
        speed = f"{statistics.median(speeds):,.0f}" if speeds else "-"
        parameters = f"{run.facts['model']['parameters']:,}" if run.facts.get("model") else "-"
        counts = (f"{run.steps_done:,}", f"{run.tokens_seen:,}", time, speed)
        rows.append((run.place, run.label, status, perplexity, *counts, run.spec["train"]["precision"], parameters))
    titles = ("Run", "Variant", "Status", "Perplexity", "Steps", "Tokens", "Time", "Tokens per second")
    titles += ("Precision", "Parameters")
    return Table("runs", "Runs", titles, rows, words=("Variant", "Status", "Precision"))


def slope_table(groups: Sequence[Group]) -> Table:
    """Slope below 0 against perplexity and non-finite values, for fixed and learnable slopes.

    Empty unless a run has a leaky ReLU or learns a slope; then also of ReLU (slope 0) and the identity (slope 1).
    """

    def order(group: Group) -> tuple[float, str]:
        slope = fixed_slope(group.runs[0])
        return (math.inf if slope is None else slope), group.name

    is_shown = any(_has_leaky_relu(run) for run in all_runs(groups))
    with_slope = [group for group in groups if is_shown and group.runs and _has_slope(group.runs[0])]
    rows = [_slope_row(group) for group in sorted(with_slope, key=order)]
    titles = ("Variant", "Slope at the start", "Slope at the end", "Gone to zero", "Perplexity", "Seeds")
    titles += ("First non-finite step", "Non-finite rows")
    notes = [
        "Slope 0 is ReLU and slope 1 the identity. Non-finite rows: attention rows with NaN or infinity, "
        "summed over layers, heads and probes of all seeds.",
        f"Gone to zero: every learnable slope ends within {SLOPE_NEAR_ZERO} of 0 or, if it began that close, closer "
        "to 0 than it began.",
    ]
    caption = "Slope below zero, perplexity and non-finite values"
    return Table("slopes", caption, titles, rows, notes, words=("Slope at the end", "Gone to zero"))


def rows_are_finite(groups: Sequence[Group]) -> bool:
    """Whether attention was probed, and no probe found a row with NaN or infinity."""
    counts = [
        value for group in groups for run in group.curve_runs for _, value in run.series("probe", "nonfinite_rows")
    ]
    return bool(counts) and not any(np.sum(rows_LH) for rows_LH in counts)


def _first_nonfinite_step(run: Run) -> int | None:
    """The first step that was skipped or diverged as non-finite, or whose probe has a non-finite row."""
    events = (*run.facts.get("skipped_steps", []), run.facts.get("divergence"))
    steps = [event["step"] for event in events if event]
    steps += [step for step, rows_LH in run.series("probe", "nonfinite_rows") if np.sum(rows_LH) > 0]
    return min(steps, default=None)


def _slope_row(group: Group) -> tuple[str, ...]:
    fixed, learned = fixed_slope(group.runs[0]), [slopes(run) for run in group.runs]
    starts, ends, gone_to_zero = {fixed}, "fixed", "-"
    if fixed is None:
        starts = {float(np.mean(of_run.first_S)) if of_run else math.nan for of_run in learned}
        ends = "; ".join(map(_slope_text, group.runs))
        gone_to_zero = ", ".join(map(_gone_to_zero, group.runs))
    nonfinite_steps = [step for run in group.runs if (step := _first_nonfinite_step(run)) is not None]
    counts = [np.sum(rows_LH) for run in group.runs for _, rows_LH in run.series("probe", "nonfinite_rows")]
    perplexity = summarise(list(group.perplexities.values()))
    start = ", ".join(f"{value:g}" for value in sorted(starts))
    cells = (start, ends, gone_to_zero, perplexity.text(), str(perplexity.n), str(min(nonfinite_steps, default="-")))
    return group.name, *cells, f"{int(sum(counts)):,}"


def _has_slope(run: Run) -> bool:
    """Whether a run has a slope to compare: leaky ReLU or, without norm, ReLU (slope 0) or the identity (slope 1)."""
    return _has_leaky_relu(run) or (run.spec["model"].get("norm") == "none" and fixed_slope(run) is not None)


def _has_leaky_relu(run: Run) -> bool:
    """Whether every layer's activation is a leaky ReLU, or some layers learn a slope."""
    return only_activation(run) == "leaky_relu" or bool(run.series("probe", "negative_slope"))


def _slope_text(run: Run) -> str:
    learned = slopes(run)
    return learned.text if learned else "-"


def _gone_to_zero(run: Run) -> str:
    learned = slopes(run)
    if run.status != "finished":
        return run.status
    return WORDS[learned.gone_to_zero] if learned else "not measured"


SHOWN = 10


def layer_table(groups: Sequence[Group]) -> Table:
    """One row per layer of every measured model: entropies, ceiling, heads in its top quarter, non-finite rows."""
    rows = []
    for run, heads in _measured(groups):
        nonfinite_LH = newest_values(run, "nonfinite_rows")
        assert nonfinite_LH is not None
        share_LH, mean_L = shares_of_ceiling(heads), layer_means(heads.entropy_LH)
        for layer, number in enumerate(heads.layers):
            entropy_H = heads.entropy_LH[layer]
            nats = (mean_L[layer], entropy_H.min(), entropy_H.max(), heads.ceiling_L[layer])
            near = f"{int((share_LH[layer] >= OVERLOAD_SHARE).sum())} of {len(entropy_H)}"
            nonfinite = str(int(nonfinite_LH[layer].sum()))
            rows.append((run.label, str(number), *(f"{value:.3f}" for value in nats), near, nonfinite))
    titles = ("Model", "Layer", "Mean", "Lowest", "Highest", "Ceiling", "Top quarter", "Non-finite rows")
    notes = ["A layer with a head that is not finite has no mean. Layers and heads count from 0."]
    return Table("layers", "Entropy of each layer, in nats", titles, rows, notes)


def extreme_head_table(groups: Sequence[Group]) -> Table:
    """The ten highest and the ten lowest heads of every measured model, by their share of the ceiling."""
    others = [q for q in recorded_quantities(groups, drawn="folded") if q.axes == ("layer", "head")]
    rows = []
    for run, heads in _measured(groups):
        shares = np.ndenumerate(shares_of_ceiling(heads))
        finite = [(float(share), index) for index, share in shares if np.isfinite(share)]
        ordered = sorted(finite, reverse=True)
        count = min(SHOWN, len(ordered) // 2) or len(ordered)
        values = [newest_values(run, q.name) for q in others]
        for kind, extremes in (("highest", ordered[:count]), ("lowest", ordered[::-1][:count])):
            for share, (layer, head) in extremes:
                entropy = (f"{heads.entropy_LH[layer, head]:.3f}", f"{100 * share:.0f} %")
                more = ("-" if v is None else f"{v[layer, head]:.3f}" for v in values)
                rows.append((run.label, kind, str(heads.layers[layer]), str(head), *entropy, *more))
    titles = ("Model", "Entropy", "Layer", "Head", "Nats", "Of the ceiling", *(q.label for q in others))
    return Table("heads", "Heads with the highest and the lowest entropy", titles, rows, words=("Entropy",))


def mover_table(groups: Sequence[Group]) -> Table:
    """The heads whose entropy differs most between two measured models; no row for any other models."""
    runs = [group.runs[0] for group in groups if not group.is_trained]
    rows, names = [], ["-", "-"]
    if len(runs) == len(groups) == 2 and len({np.shape(newest_values(run, "entropy_nats")) for run in runs}) == 1:
        names = [group.name for group in groups]
        for head in compare(*runs).dropna().head(2 * SHOWN).itertuples():
            nats = (f"{head.first:.3f}", f"{head.second:.3f}", f"{head.difference:+.3f}")
            rows.append((f"layer {head.layer} head {head.head}", *nats))
    titles = ("Head", *names, "Difference")
    return Table("movers", "Heads whose entropy differs most, in nats", titles, rows)


def _measured(groups: Sequence[Group]) -> list[tuple[Run, Heads]]:
    runs = [run for group in groups for run in group.runs if run.kind == "measurement"]
    return [(run, heads) for run in runs if (heads := final_heads(run)) is not None]
