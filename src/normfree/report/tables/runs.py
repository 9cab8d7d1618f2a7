"""One row a run: verdicts, cost in time, slopes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from normfree.analysis.entropy import final_heads, probed_heads
from normfree.analysis.groups import Group, all_runs
from normfree.analysis.seeds import decimals, summarise
from normfree.analysis.verdicts import (
    COLLAPSE_NATS,
    OVERLOAD_SHARE,
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
from normfree.report.tables.table import Column, Table
from normfree.store.runs import Run, divergence_text


def verdict_table(groups: Sequence[Group]) -> Table:
    """Overload, collapse and slopes of every run that was measured, each with its layers and step."""
    columns = (
        Column("Run", numeric=False),
        Column("Measured at step"),
        Column("Overload", numeric=False),
        Column("Collapse", numeric=False),
        Column("Slopes", numeric=False),
    )
    notes = (
        f"Overload: half or more of the heads in the first third of the layers at or above "
        f"{100 * OVERLOAD_SHARE:.0f} % of the causal ceiling. Untrained heads are nearly uniform, so a "
        "run may begin overloaded.",
        f"Collapse: a head below {COLLAPSE_NATS} nats.",
        f"Slopes: apart when the highest is {SLOPE_SPREAD} or more above the lowest.",
        "Undecided: heads without a finite entropy could tip it. Layers and heads count from 0.",
    )
    rows = tuple(_verdict_row(run) for run in all_runs(groups))
    return Table("verdicts", "Verdicts on every run", columns, rows, notes)


def run_table(groups: Sequence[Group]) -> Table:
    """Status, perplexity, steps, tokens, time and speed of every run."""
    columns = (
        Column("Run", numeric=False),
        Column("Variant", numeric=False),
        Column("Status", numeric=False),
        Column("Perplexity"),
        Column("Steps"),
        Column("Tokens"),
        Column("Time"),
        Column("Tokens per second"),
        Column("Precision", numeric=False),
        Column("Parameters"),
    )
    return Table("runs", "Runs", columns, tuple(_run_row(run) for run in all_runs(groups)))


def slope_table(groups: Sequence[Group]) -> Table:
    """Slope below 0 against perplexity and non-finite values, for fixed and learnable slopes."""
    rows = [_slope_row(group) for group in sorted(groups, key=_by_slope) if group.runs and has_slope(group.runs[0])]
    columns = (
        Column("Variant", numeric=False),
        Column("Slope at the start"),
        Column("Slope at the end", numeric=False),
        Column("Gone to zero", numeric=False),
        Column("Perplexity"),
        Column("Seeds"),
        Column("First non-finite step"),
        Column("Non-finite rows"),
    )
    notes = (
        "Slope 0 is ReLU and slope 1 the identity. Non-finite rows: attention rows with NaN or infinity, "
        "summed over layers, heads and probes of all seeds.",
        f"Gone to zero: every learnable slope ends within {SLOPE_NEAR_ZERO} of 0, or, if it began within that, nearer "
        "to 0 than it began.",
    )
    return Table("slopes", "Slope below zero, perplexity and non-finite values", columns, tuple(rows), notes)


def has_slope(run: Run) -> bool:
    """Whether a run belongs on the slopes page: leaky ReLU, or without norm its ends ReLU and identity."""
    return has_negative_slope(run) or (run.spec["model"].get("norm") == "none" and fixed_slope(run) is not None)


def has_negative_slope(run: Run) -> bool:
    """Whether every layer's activation is a leaky ReLU, or some layers learn a slope."""
    return only_activation(run) == "leaky_relu" or bool(run.series("probe", "negative_slope"))


def first_nonfinite_step(run: Run) -> int | None:
    """The first step that was skipped or diverged as non-finite, or whose probe has a non-finite row."""
    found = [event["step"] for event in (*run.facts.get("skipped_steps", []), run.facts.get("divergence")) if event]
    found += [step for step, rows_LH in run.series("probe", "nonfinite_rows") if np.sum(rows_LH) > 0]
    return min(found, default=None)


def verdict_words(run: Run) -> tuple[str, str, str]:
    """Overload, collapse and slopes of one run in words."""
    heads = final_heads(run)
    if heads is None:
        return "not measured", "not measured", "-"
    probes, numbers = probed_heads(run), run.layer_numbers("entropy_nats", len(heads.entropy_LH))
    return (
        _overload_words(overload(heads, probes), numbers),
        _collapse_words(collapse(heads, probes), numbers),
        _slope_words(run),
    )


def duration(seconds: float) -> str:
    """`1 h 05 min`, `6 min 20 s` or `41 s`."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _verdict_row(run: Run) -> tuple[str, ...]:
    heads = final_heads(run)
    return (run.place, "-" if heads is None else str(heads.step), *verdict_words(run))


def _overload_words(verdict: Overload, numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[verdict.early_layers - 1]
    layers = f"layer {first}" if first == last else f"layers {first}-{last}"
    share = f"{100 * verdict.share:.0f} % of the heads in {layers}"
    if verdict.holds:
        since = "" if verdict.since_step is None else f", since step {verdict.since_step}"
        return f"yes: {share}{since}"
    seen = "" if verdict.first_step is None else f"; it did at step {verdict.first_step}"
    return f"{'undecided' if verdict.holds is None else 'no'}: {share}{seen}"


def _collapse_words(verdict: Collapse, numbers: Sequence[int]) -> str:
    if not verdict.holds:
        seen = "" if verdict.first_step is None else f"; one was at step {verdict.first_step}"
        return ("undecided" if verdict.holds is None else "no") + seen
    named = ", ".join(f"layer {numbers[layer]} head {head}" for layer, head in verdict.heads[:3])
    more = f" and {len(verdict.heads) - 3} more" if len(verdict.heads) > 3 else ""
    first = "" if verdict.first_step is None else f", first at step {verdict.first_step}"
    return f"yes: {named}{more} (lowest {verdict.lowest_nats:.3f} nats){first}"


def _slope_words(run: Run) -> str:
    found = slopes(run)
    if found is None:
        return "-"
    finished, then = run.status == "finished", f"at step {found.final_step}"
    if found.layers is None:
        return f"one shared slope, {found.final_S[0]:.3f} {'at the end' if finished else then}"
    low, high = found.layers
    if len(found.final_S) == 1:
        return f"{found.final_S[0]:.3f} (layer {low}){'' if finished else ' ' + then}, the only layer with one"
    apart = "apart" if found.diverging else "together"
    first = "" if found.first_step is None else f", first at step {found.first_step}"
    lowest, highest = np.min(found.final_S), np.max(found.final_S)  # NaN where one is
    ends = f"from {lowest:.3f} (layer {low}) to {highest:.3f} (layer {high})"
    return f"{apart}{'' if finished else ' ' + then}: {ends}{first}"


def _run_row(run: Run) -> tuple[str, ...]:
    facts = run.facts
    speeds = [v for _, v in run.series("train", "tokens_per_second") if math.isfinite(v)]
    status, divergence = run.status, facts.get("divergence")
    if divergence:
        status += f": {divergence_text(divergence)}"
    if skipped := facts.get("skipped_steps"):
        status += f", {len(skipped)} non-finite steps skipped (first: {skipped[0]['step']})"
    return (
        run.place,
        run.label,
        status,
        decimals(run.perplexity) if run.status == "finished" else "-",
        f"{run.steps_done:,}",
        f"{run.tokens_seen:,}",
        duration(facts.get("wall_seconds") or math.nan),
        f"{statistics.median(speeds):,.0f}" if speeds else "-",
        run.spec["train"]["precision"],
        f"{facts['model']['parameters']:,}" if facts.get("model") else "-",
    )


def _by_slope(group: Group) -> tuple[float, str]:
    slope = fixed_slope(group.runs[0]) if group.runs else None
    return (math.inf if slope is None else slope), group.name


def _slope_row(group: Group) -> tuple[str, ...]:
    fixed = fixed_slope(group.runs[0])
    starts = {_slope_at_start(run) for run in group.runs}
    steps = [step for run in group.runs if (step := first_nonfinite_step(run)) is not None]
    rows = sum(int(np.sum(value)) for run in group.runs for _, value in run.series("probe", "nonfinite_rows"))
    summary = summarise(list(group.perplexities.values()))
    return (
        group.name,
        ", ".join(f"{start:g}" for start in sorted(starts)),
        "fixed" if fixed is not None else "; ".join(_slope_words(run) for run in group.runs),
        "-" if fixed is not None else ", ".join(_gone_to_zero(run) for run in group.runs),
        summary.text(),
        str(summary.n),
        str(min(steps)) if steps else "-",
        f"{rows:,}",
    )


def _gone_to_zero(run: Run) -> str:
    if run.status != "finished":
        return run.status
    found = slopes(run)
    return "not measured" if found is None else "yes" if found.gone_to_zero else "no"


def _slope_at_start(run: Run) -> float:
    fixed = fixed_slope(run)
    if fixed is not None:
        return fixed
    series = run.series("probe", "negative_slope")
    return float(np.mean(series[0][1])) if series else math.nan
