"""Tables of runs: verdicts, time and speed, slopes, and the layers and heads of measured models."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from normfree.analysis import entropy, verdicts
from normfree.analysis.groups import Group, all_runs, score_of
from normfree.analysis.seeds import decimals, summarise
from normfree.report.tables.table import Table
from normfree.store.progress import duration
from normfree.store.runs import Run, divergence_text


def verdict_table(groups: Sequence[Group]) -> Table:
    """Overload, collapse and slopes of every run."""
    notes = [
        "Overload, in any group of heads: at least half of those in the first third of its layers are at or above "
        f"{100 * entropy.OVERLOAD_SHARE:.0f} % of the {entropy.ceiling_words(all_runs(groups))}.",
        f"Collapse: a head below {verdicts.COLLAPSE_NATS} nats.",
        f"Slopes: apart if the highest is {verdicts.SLOPE_SPREAD} or more above the lowest.",
        "Undecided: some heads are NaN and could change the verdict. Layers and heads count from 0.",
    ]
    if rows_are_finite(groups):
        notes.append("No probe of any run found an attention row with NaN or infinity.")
    rows = []
    for run in all_runs(groups):
        cells = ("-", "not measured", "not measured", "-")
        if heads := entropy.final_heads(run):
            probes, slopes = entropy.probed_heads(run), verdicts.slopes(run)
            step = str(heads.step) if run.kind == "run" else "-"
            judged = (str(verdicts.overload(heads, probes)), str(verdicts.collapse(heads, probes)))
            cells = (step, *judged, slopes.text if slopes else "-")
        rows.append((run.place, *cells))
    titles = ("Run", "Measured at step", "Overload", "Collapse", "Slopes")
    return Table("verdicts", "Verdicts on every run", titles, rows, notes, words=titles[2:])


def run_table(groups: Sequence[Group]) -> Table:
    """Status, score, steps, tokens, time and speed of every run."""
    rows = []
    for run in all_runs(groups):
        speeds = [v for _, v in run.series("train", "tokens_per_second") if math.isfinite(v)]
        status = run.status
        if divergence := run.facts.get("divergence"):
            status += f": {divergence_text(divergence)}"
        if skipped := run.facts.get("skipped_steps"):
            status += f", {len(skipped)} non-finite steps skipped (first: {skipped[0]['step']})"
        score = decimals(run.score) if run.status == "finished" else "-"
        time = duration(run.facts.get("wall_seconds") or math.nan)
        speed = f"{statistics.median(speeds):,.0f}" if speeds else "-"
        parameters = f"{run.facts['model']['parameters']:,}" if run.facts.get("model") else "-"
        counts = (f"{run.steps_done:,}", f"{run.tokens_seen:,}", time, speed)
        device = run.facts.get("environment", {})
        cpu = " ".join(filter(None, (device.get("processor"), device.get("instruction_set"))))
        machine = cpu if device.get("device") == "cpu" else device.get("device", "-")
        rows.append((run.place, run.label, status, score, *counts, run.spec["train"]["precision"], machine, parameters))
    titles = ("Run", "Variant", "Status", score_of(groups).name.capitalize(), "Steps", "Tokens", "Time")
    titles += ("Tokens per second", "Precision", "Machine", "Parameters")
    return Table("runs", "Runs", titles, rows, words=("Variant", "Status", "Precision", "Machine"))


def slope_table(groups: Sequence[Group]) -> Table:
    """Slope below 0 against the score and non-finite values, for fixed and learnable slopes.

    Empty unless a run has a leaky ReLU or learns a slope; then also of ReLU (slope 0) and the identity (slope 1).
    """
    is_shown = any(_has_leaky_relu(run) for run in all_runs(groups))
    rows = sorted(_slope_row(group) for group in groups if is_shown and group.runs and _has_slope(group.runs[0]))
    titles = ("Variant", "Slope at the start", "Slope at the end", "Gone to zero", score_of(groups).name.capitalize())
    titles += ("Seeds", "First non-finite step", "Non-finite rows")
    notes = [
        "Slope 0 is ReLU and slope 1 the identity. Non-finite rows: attention rows with NaN or infinity, "
        "summed over layers, heads and probes of all seeds.",
        f"Gone to zero: every learnable slope ends within {verdicts.SLOPE_NEAR_ZERO} of 0 or, if it began that close, "
        "closer to 0 than it began.",
    ]
    caption = f"Slope below zero, {score_of(groups).name} and non-finite values"
    words = ("Slope at the end", "Gone to zero")
    return Table("slopes", caption, titles, [cells for _, cells in rows], notes, words)


def _slope_row(group: Group) -> tuple[float, tuple[str, ...]]:
    """The fixed slope, infinity if it is learned, and the cells."""
    fixed, learned = verdicts.fixed_slope(group.runs[0]), [verdicts.slopes(run) for run in group.runs]
    starts, ends, gone_to_zero = {fixed or 0.0}, "fixed", "-"
    if fixed is None:
        starts = {float(np.mean(slopes.first_S)) if slopes else math.nan for slopes in learned}
        ends = "; ".join(slopes.text if slopes else "-" for slopes in learned)
        answers = [verdicts.WORDS[slopes.gone_to_zero] if slopes else "not measured" for slopes in learned]
        answers = [a if run.status == "finished" else run.status for run, a in zip(group.runs, answers, strict=True)]
        gone_to_zero = ", ".join(answers)
    nonfinite_steps = [step for run in group.runs if (step := _first_nonfinite_step(run)) is not None]
    counts = [np.sum(rows_LH) for run in group.runs for _, rows_LH in run.series("probe", "nonfinite_rows")]
    score = summarise(list(group.scores.values()))
    start = ", ".join(f"{value:g}" for value in sorted(starts))
    cells = (start, ends, gone_to_zero, score.text(), str(score.n), str(min(nonfinite_steps, default="-")))
    return math.inf if fixed is None else fixed, (group.name, *cells, f"{int(sum(counts)):,}")


def _has_slope(run: Run) -> bool:
    """Whether a run has a slope to compare: leaky ReLU or, without norm, ReLU (slope 0) or the identity (slope 1)."""
    without_norm = run.spec["model"].get("norm") == "none"
    return _has_leaky_relu(run) or (without_norm and verdicts.fixed_slope(run) is not None)


def _has_leaky_relu(run: Run) -> bool:
    """Whether every layer's activation is a leaky ReLU, or some layers learn a slope."""
    return verdicts.only_activation(run) == "leaky_relu" or bool(run.series("probe", "negative_slope"))


def rows_are_finite(groups: Sequence[Group]) -> bool:
    """Whether attention was probed, and no probe found a row with NaN or infinity."""
    counts = [value for run in all_runs(groups) for _, value in run.series("probe", "nonfinite_rows")]
    return bool(counts) and not any(np.sum(rows_LH) for rows_LH in counts)


def _first_nonfinite_step(run: Run) -> int | None:
    """The first step that was skipped or diverged as non-finite, or whose probe has a non-finite row."""
    events = (*run.facts.get("skipped_steps", []), run.facts.get("divergence"))
    steps = [event["step"] for event in events if event]
    steps += [step for step, rows_LH in run.series("probe", "nonfinite_rows") if np.sum(rows_LH) > 0]
    return min(steps, default=None)


def layer_table(groups: Sequence[Group]) -> Table:
    """One row per layer of every measured model: entropies, ceiling, heads in its top quarter, non-finite rows."""
    rows = []
    for run, heads in _measured(groups):
        near_uniform_LH = entropy.shares_of_ceiling(heads) >= entropy.OVERLOAD_SHARE
        nonfinite_LH = np.array(entropy.newest_values(run, "nonfinite_rows"))
        for layer, exists_H in enumerate(heads.existing):
            entropy_H = heads.entropy_LH[layer][exists_H]
            nats = (entropy_H.mean(), entropy_H.min(), entropy_H.max(), heads.ceiling_L[layer])
            near = f"{near_uniform_LH[layer].sum()} of {len(entropy_H)}"
            cells = (*(f"{value:.3f}" for value in nats), near, f"{nonfinite_LH[layer].sum():.0f}")
            rows.append((run.label, str(heads.layers[layer]), *cells))
    titles = ("Model", "Layer", "Mean", "Lowest", "Highest", "Ceiling", "Top quarter", "Non-finite rows")
    notes = ["A layer with a head that is not finite has no mean. Layers and heads count from 0."]
    return Table("layers", "Entropy of each layer, in nats", titles, rows, notes)


def extreme_head_table(groups: Sequence[Group]) -> Table:
    """The ten highest and the ten lowest heads of every measured model, by their share of the ceiling."""
    others = [q for q in entropy.recorded_quantities(groups, drawn="folded") if q.axes == ("layer", "head")]
    rows = []
    for run, heads in _measured(groups):
        shares = np.ndenumerate(entropy.shares_of_ceiling(heads))
        finite = [(float(share), index) for index, share in shares if np.isfinite(share)]
        ordered = sorted(finite, reverse=True)
        count = min(10, len(ordered) // 2) or len(ordered)
        values = [entropy.newest_values(run, q.name) for q in others]
        for kind, extremes in (("highest", ordered[:count]), ("lowest", ordered[::-1][:count])):
            for share, (layer, head) in extremes:
                nats = (f"{heads.entropy_LH[layer, head]:.3f}", f"{100 * share:.0f} %")
                more = ("-" if v is None else f"{v[layer, head]:.3f}" for v in values)
                rows.append((run.label, kind, str(heads.layers[layer]), str(head), *nats, *more))
    titles = ("Model", "Entropy", "Layer", "Head", "Nats", "Of the ceiling", *(q.label for q in others))
    return Table("heads", "Heads with the highest and the lowest entropy", titles, rows, words=("Entropy",))


def _measured(groups: Sequence[Group]) -> list[tuple[Run, entropy.Heads]]:
    runs = [run for group in groups for run in group.runs if run.kind == "measurement"]
    return [(run, heads) for run in runs if (heads := entropy.final_heads(run)) is not None]
