"""Tables of runs: verdicts, time and speed, slopes."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np

from normfree.analysis.entropy import OVERLOAD_SHARE, final_heads, probed_heads
from normfree.analysis.groups import Group, all_runs
from normfree.analysis.seeds import decimals, summarise
from normfree.analysis.verdicts import (
    COLLAPSE_NATS,
    SLOPE_NEAR_ZERO,
    SLOPE_SPREAD,
    Collapse,
    Overload,
    collapse,
    fixed_slope,
    only_activation,
    overload,
    slopes,
)
from normfree.report.tables.table import Table
from normfree.store.progress import duration
from normfree.store.runs import Run, divergence_text

_MANY_RUNS = 24


def verdict_table(groups: Sequence[Group]) -> Table:
    """Overload, collapse and slopes of every run; of many runs, how often each verdict holds in every variant."""
    rows = []
    if len(all_runs(groups)) > _MANY_RUNS:
        return _verdict_counts(groups)
    for run in all_runs(groups):
        heads = final_heads(run)
        if heads is None:
            rows.append((run.place, "-", "not measured", "not measured", "-"))
            continue
        probes, numbers = probed_heads(run), run.layer_numbers("entropy_nats", len(heads.entropy_LH))
        verdicts = (_overload_text(overload(heads, probes), numbers), _collapse_text(collapse(heads, probes), numbers))
        rows.append((run.place, str(heads.step), *verdicts, _slope_text(run)))
    titles = ("Run", "Measured at step", "Overload", "Collapse", "Slopes")
    return Table("verdicts", "Verdicts on every run", titles, rows, _verdict_notes(groups), words=titles[2:])


def _verdict_counts(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        heads = [measured for run in group.members if (measured := final_heads(run)) is not None]
        learned = [measured for run in group.members if (measured := slopes(run)) is not None]
        verdicts = (
            [overload(h).holds for h in heads],
            [collapse(h).holds for h in heads],
            [s.diverging for s in learned],
        )
        rows.append((group.name, *map(_count_text, verdicts), str(len(group.members))))
    titles = ("Variant", "Overload", "Collapse", "Slopes apart", "Runs")
    return Table("verdicts", "Verdicts on every variant", titles, rows, _verdict_notes(groups), words=titles[1:4])


def _count_text(verdicts: Sequence[bool | None]) -> str:
    """`yes`, `no`, or `4 yes, 1 undecided`."""
    counts = Counter({True: "yes", False: "no", None: "undecided"}[holds] for holds in verdicts)
    return ", ".join(f"{count} {word}" if len(counts) > 1 else word for word, count in counts.items()) or "-"


def _verdict_notes(groups: Sequence[Group]) -> list[str]:
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
    return notes


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
    """Slope below 0 against perplexity and non-finite values, for fixed and learnable slopes."""

    def order(group: Group) -> tuple[float, str]:
        slope = fixed_slope(group.runs[0])
        return (math.inf if slope is None else slope), group.name

    rows = []
    for group in sorted([g for g in groups if g.runs and has_slope(g.runs[0])], key=order):
        learns = fixed_slope(group.runs[0]) is None
        starts = sorted({_slope_at_start(run) for run in group.runs})
        nonfinite_steps = [step for run in group.runs if (step := first_nonfinite_step(run)) is not None]
        counts = [np.sum(rows_LH) for run in group.runs for _, rows_LH in run.series("probe", "nonfinite_rows")]
        summary = summarise(list(group.perplexities.values()))
        cells = (
            ", ".join(f"{start:g}" for start in starts),
            "; ".join(map(_slope_text, group.runs)) if learns else "fixed",
            ", ".join(map(_gone_to_zero, group.runs)) if learns else "-",
            *(summary.text(), str(summary.n)),
            str(min(nonfinite_steps, default="-")),
        )
        rows.append((group.name, *cells, f"{int(sum(counts)):,}"))
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


def has_slope(run: Run) -> bool:
    """Whether a run has a slope to compare: leaky ReLU or, without norm, ReLU (slope 0) or the identity (slope 1)."""
    return has_negative_slope(run) or (run.spec["model"].get("norm") == "none" and fixed_slope(run) is not None)


def has_negative_slope(run: Run) -> bool:
    """Whether every layer's activation is a leaky ReLU, or some layers learn a slope."""
    return only_activation(run) == "leaky_relu" or bool(run.series("probe", "negative_slope"))


def rows_are_finite(groups: Sequence[Group]) -> bool:
    """Whether attention was probed, and no probe found a row with NaN or infinity."""
    counts = [value for group in groups for run in group.drawn for _, value in run.series("probe", "nonfinite_rows")]
    return bool(counts) and not any(np.sum(rows_LH) for rows_LH in counts)


def first_nonfinite_step(run: Run) -> int | None:
    """The first step that was skipped or diverged as non-finite, or whose probe has a non-finite row."""
    events = (*run.facts.get("skipped_steps", []), run.facts.get("divergence"))
    steps = [event["step"] for event in events if event]
    steps += [step for step, rows_LH in run.series("probe", "nonfinite_rows") if np.sum(rows_LH) > 0]
    return min(steps, default=None)


def _overload_text(verdict: Overload, numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[verdict.early_layers - 1]
    layers = f"layer {first}" if first == last else f"layers {first}-{last}"
    share = f"{100 * verdict.share:.0f} % of the heads in {layers}"
    if verdict.holds:
        since = "" if verdict.since_step is None else f", since step {verdict.since_step}"
        return f"yes: {share}{since}"
    earlier = "" if verdict.first_step is None else f"; it did at step {verdict.first_step}"
    return f"{'undecided' if verdict.holds is None else 'no'}: {share}{earlier}"


def _collapse_text(verdict: Collapse, numbers: Sequence[int]) -> str:
    if not verdict.holds:
        earlier = "" if verdict.first_step is None else f"; one was at step {verdict.first_step}"
        return ("undecided" if verdict.holds is None else "no") + earlier
    heads = ", ".join(f"layer {numbers[layer]} head {head}" for layer, head in verdict.heads[:3])
    more = f" and {len(verdict.heads) - 3} more" if len(verdict.heads) > 3 else ""
    first = "" if verdict.first_step is None else f", first at step {verdict.first_step}"
    return f"yes: {heads}{more} (lowest {verdict.lowest_nats:.3f} nats){first}"


def _slope_text(run: Run) -> str:
    learned = slopes(run)
    if learned is None:
        return "-"
    finished, then = run.status == "finished", f"at step {learned.final_step}"
    if learned.layers is None:
        return f"one shared slope, {learned.final_S[0]:.3f} {'at the end' if finished else then}"
    when, (low, high) = "" if finished else f" {then}", learned.layers
    if len(learned.final_S) == 1:
        return f"{learned.final_S[0]:.3f} (layer {low}){when}, the only layer with one"
    first = "" if learned.first_step is None else f", first at step {learned.first_step}"
    lowest, highest = np.min(learned.final_S), np.max(learned.final_S)  # NaN if one of them is
    ends = f"from {lowest:.3f} (layer {low}) to {highest:.3f} (layer {high})"
    return f"{'apart' if learned.diverging else 'together'}{when}: {ends}{first}"


def _gone_to_zero(run: Run) -> str:
    if run.status != "finished":
        return run.status
    learned = slopes(run)
    return "not measured" if learned is None else "yes" if learned.gone_to_zero else "no"


def _slope_at_start(run: Run) -> float:
    fixed = fixed_slope(run)
    if fixed is not None:
        return fixed
    series = run.series("probe", "negative_slope")
    return float(np.mean(series[0][1])) if series else math.nan
