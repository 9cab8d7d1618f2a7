"""Tables of results: perplexity beside the paper's, differences over seeds, the paper's claims, ranges of entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

from normfree.analysis import published
from normfree.analysis.entropy import top_quarter_share, trained_heads
from normfree.analysis.groups import Group, counterparts
from normfree.analysis.published import BASELINE, COMPARISONS
from normfree.analysis.ranges import NORMALISERS, RANGES, pooled_ranges
from normfree.analysis.seeds import Difference, paired_difference, summarise
from normfree.report.tables.table import Table


def perplexity_table(groups: Sequence[Group]) -> Table:
    """Final validation perplexity of each variant, its change against the baseline, and the unigram perplexity.

    The baseline is the one chosen for the groups, else the paper's.

    The paper's numbers are added, unless the runs have a variant more than once, as in a sweep.
    """
    with_runs = [group for group in groups if group.runs]
    rows = []
    for group in with_runs:
        summary = summarise(list(group.perplexities.values()))
        bits = summarise([(run.facts.get("final") or {}).get("bits_per_byte", math.nan) for run in group.runs])
        rows.append((group.name, summary.text(), str(summary.n), _against_baseline(group, groups), bits.text(3)))
    corpora = {run.corpus: run.facts["corpus"] for group in with_runs for run in group.runs}
    for fingerprint, corpus in sorted(corpora.items()):
        name = "Unigram" if len(corpora) == 1 else f"Unigram (corpus {fingerprint[:12]})"
        rows.append((name, f"{corpus['unigram_perplexity']:.2f}", "-", "-", "-"))
    baseline = baseline_label(groups)
    titles = ("Variant", "Perplexity", "Seeds", f"Against {baseline}", "Bits per byte")
    if paper := _paper_cells(groups):
        titles += ("Paper", f"Paper, against {baseline}", "Paper's model")
        rows = [(*row, *paper.get(row[0], ("-", "-", "-"))) for row in rows]
    caption = "Validation perplexity after training: mean and sample standard deviation over seeds, lower is better"
    return Table("perplexity", caption, titles, rows, _perplexity_notes(groups), words=("Paper's model",))


def difference_table(groups: Sequence[Group]) -> Table:
    """Relative differences of perplexity for all pairs, paired by seed, with a 95 % Student-t interval."""
    rows = []
    for ours, theirs in all_pairs(groups):
        difference = perplexity_difference(ours, theirs)
        model = published.counterpart(ours.runs[0].spec)
        paper = percent(published.relative_difference(model, ours.label, theirs.label))
        interval = "-"
        if math.isfinite(difference.low):
            interval = f"{percent(difference.low)} to {percent(difference.high)}"
        kind = "the paper's" if _is_named(ours, theirs) else "exploratory"
        rows.append((comparison(ours, theirs), kind, mean_text(difference), interval, str(difference.n), paper))
    titles = ("Comparison", "Kind", "Difference in perplexity", "95 % interval", "Pairs", "Paper")
    notes = [
        "Seeds are paired: the same seed and the same order of the data on both sides. "
        "Student's t over the pairs; one pair has no interval.",
        "Exploratory: the paper makes no claim about this pair. Of twenty such intervals, one misses 0 by chance.",
    ]
    return Table("differences", "Paired relative differences of perplexity", titles, rows, notes, words=("Kind",))


def perplexity_difference(ours: Group, theirs: Group) -> Difference:
    """Paired relative difference of final perplexity, as a share of `theirs`."""
    return paired_difference(ours.perplexities, theirs.perplexities, relative=True)


def top_quarter_difference(ours: Group, theirs: Group) -> Difference:
    """Paired difference of the share of heads at or above 3/4 of the causal ceiling."""
    shares = [
        {seed: top_quarter_share(trained_heads(run)) for seed, run in zip(group.perplexities, group.runs, strict=True)}
        for group in (ours, theirs)
    ]
    return paired_difference(*shares)


# Claim, two variants, the difference between them, and whether the claim says that it is above 0.
CLAIMS: tuple[tuple[str, str, str, Callable[[Group, Group], Difference], bool], ...] = (
    ("(a) With LayerNorm, ReLU is worse than GELU", "SM+LN+R", "SM+LN+G", perplexity_difference, True),
    ("(b) Without it, ReLU is better", "SM+R", "SM+G", perplexity_difference, False),
    ("(c) GELU puts more heads into the top quarter", "SM+G", "SM+R", top_quarter_difference, True),
    ("(g) ReLU early, GELU late beats GELU", "SM+R/G", "SM+G", perplexity_difference, False),
    ("(g) GELU early, ReLU late beats GELU", "SM+G/R", "SM+G", perplexity_difference, False),
    ("(g) ReLU early, GELU late beats ReLU", "SM+R/G", "SM+R", perplexity_difference, False),
    ("(g) ReLU belongs into the early half", "SM+R/G", "SM+G/R", perplexity_difference, False),
)


_NAMED = (*COMPARISONS, *((label, other) for _, label, other, _, _ in CLAIMS))
"""Pairs of variants that the paper compares or makes a claim about."""
_FEW = 12


def claim_table(groups: Sequence[Group]) -> Table:
    """The paper's claims that these runs can test, each with a verdict that the 95 % interval decides."""
    rows = []
    for claim, label, other, measure, above in CLAIMS:
        measured, unit = ("perplexity", "%") if measure is perplexity_difference else ("share of heads", "points")
        for ours, theirs in comparable_pairs(groups, [(label, other)]):
            difference = measure(ours, theirs)
            low, high = (difference.low, difference.high) if above else (-difference.high, -difference.low)
            verdict = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
            interval = "-"
            if math.isfinite(difference.low):
                interval = f"{100 * difference.low:+z.1f} to {percent(difference.high, unit)}"
            numbers = (mean_text(difference, unit), interval, str(difference.n))
            rows.append((claim, verdict, comparison(ours, theirs), measured, *numbers))
    titles = ("Claim", "Verdict", "Compared", "Measured", "Difference", "95 % interval", "Pairs")
    notes = [
        "Holds or does not hold: the 95 % Student-t interval over paired seeds lies entirely on one side of 0. "
        "Undecided: it contains 0, or there is only one pair, or a run diverged. The interval is valid only if the "
        "number of seeds was fixed in advance, and for its own claim only: of twenty true differences of 0, one "
        "interval misses 0 on average.",
        "Share of heads: those at or above 3/4 of the causal ceiling; the difference is in percentage points.",
    ]
    return Table("claims", "The paper's claims at this scale", titles, rows, notes, words=titles[:4])


def range_table(groups: Sequence[Group]) -> Table:
    """Share of heads per quarter of the maximum under each normaliser, pooled over seeds."""
    pooled, rows = pooled_ranges(groups), []
    for group in groups:
        for normaliser, of_group in pooled.items():
            if (ranges := of_group.get(group.name)) is None:
                continue
            shares = (f"{100 * share:.1f} %" for share in ranges.counts.shares)
            seeds = f"{ranges.seeds}" + ("" if ranges.seeds == len(group.runs) else f" of {len(group.runs)}")
            counts = (seeds, str(ranges.counts.heads), str(ranges.counts.nonfinite))
            comparable = normaliser == "observed" and published.is_gpt2(group.runs[0].spec)
            paper = published.RANGE_PERCENT.get(group.label) if comparable else None
            paper_text = " / ".join(map(str, paper or "-"))
            rows.append((group.name, normaliser, f"{ranges.maximum_nats:.3f}", *shares, *counts, paper_text))
    titles = ("Variant", "Normaliser", "Max (nats)", *RANGES, "Seeds", "Heads", "NaN heads", "Paper, GPT-2 125M (%)")
    notes = [f"{name}: {meaning}." for name, meaning in NORMALISERS.items()]
    if missing := [run.place for group in groups for run in group.runs if trained_heads(run) is None]:
        notes.append(f"Not measured after training, so not counted: {', '.join(missing)}.")
    notes.append("NaN heads are in no range.")
    return Table("ranges", "Share of heads per quarter of the maximum entropy", titles, rows, notes, ("Normaliser",))


def comparable_pairs(
    groups: Sequence[Group], comparisons: Iterable[tuple[str, str]] = COMPARISONS
) -> list[tuple[Group, Group]]:
    """The groups behind each comparison of two labels, as `counterparts` pairs them."""
    ours_first = [(ours, other) for label, other in comparisons for ours in groups if ours.label == label]
    return [(ours, theirs) for ours, other in ours_first for theirs in counterparts(ours, other, groups)]


def all_pairs(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Every variant with the baseline if one was chosen; else the paper's pairs, then every other pair of a recipe
    with a common seed."""
    bases = [group for group in groups if group.is_baseline]
    if bases:
        of_label = dict.fromkeys(base.label for base in bases)
        pairs = [(ours, other) for ours in groups for label in of_label for other in counterparts(ours, label, groups)]
        return [(ours, other) for ours, other in pairs if other.is_baseline and not ours.is_baseline]
    pairs = {}
    for ours, theirs in comparable_pairs(groups, _NAMED) + [(b, a) for a, b in combinations(groups, 2)]:
        if ours.recipe == theirs.recipe and ours.perplexities.keys() & theirs.perplexities.keys():
            pairs.setdefault(frozenset((ours.name, theirs.name)), (ours, theirs))
    return list(pairs.values())


def main_pairs(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """The pairs for figures: all of them if they are few, else those with the baseline or in the paper."""
    pairs = all_pairs(groups)
    if len(pairs) <= _FEW or any(group.is_baseline for group in groups):
        return pairs
    return [(a, b) for a, b in pairs if _is_named(a, b)] or pairs[:_FEW]


def _is_named(ours: Group, theirs: Group) -> bool:
    return (ours.label, theirs.label) in _NAMED or (theirs.label, ours.label) in _NAMED


def baseline_label(groups: Sequence[Group]) -> str:
    """The label of the chosen baseline, else the paper's."""
    return next((group.label for group in groups if group.is_baseline), BASELINE)


def comparison(ours: Group, theirs: Group) -> str:
    """`SM+R against SM+G`; a recipe or tag that both have is named once."""
    same = ours.name.removeprefix(ours.label) == theirs.name.removeprefix(theirs.label)
    return f"{ours.label if same else ours.name} against {theirs.name}"


def percent_with_interval(difference: Difference) -> str:
    """`-5.1 % (-8.6 to -1.6)`: a relative difference, and its 95 % interval if it has one."""
    low, high = difference.low, difference.high
    interval = f" ({100 * low:+z.1f} to {100 * high:+z.1f})" if math.isfinite(low) else ""
    return mean_text(difference) + interval


def mean_text(difference: Difference, unit: str = "%") -> str:
    """`+4.3 %`, or `NaN (1/3)` if 1 of 3 pairs is not finite."""
    if difference.nonfinite:
        return f"NaN ({difference.nonfinite}/{difference.n})"
    return percent(difference.mean, unit)


def percent(share: float | None, unit: str = "%") -> str:
    """`+4.3 %`, or `-` for NaN or None."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:+z.1f} {unit}"


def _paper_cells(groups: Sequence[Group]) -> dict[str, tuple[str, str, str]]:
    """The paper's perplexity, its change and its model by group; empty if the paper has none, or one of them twice."""
    cells, in_paper = {}, []
    for group in groups:
        model = published.counterpart(group.members[0].spec)
        paper = published.PERPLEXITY[model].get(group.label)
        if group.runs and paper is not None:
            in_paper.append((model, group.label))
            change = percent(published.relative_difference(model, group.label, baseline_label(groups)))
            cells[group.name] = (f"{paper:.3f}", change, model)
    return cells if len(in_paper) == len(set(in_paper)) else {}


def _against_baseline(group: Group, groups: Sequence[Group]) -> str:
    """The mean over the pairs, with their number if some seeds of the group have no partner."""
    baseline = baseline_label(groups)
    if group.label == baseline:
        return "baseline"
    bases = counterparts(group, baseline, groups)
    if len(bases) != 1:
        return "-"
    difference = perplexity_difference(group, bases[0])
    some = not difference.nonfinite and 0 < difference.n < len(group.perplexities)
    return mean_text(difference) + (f" (n = {difference.n})" if some else "")


def _perplexity_notes(groups: Sequence[Group]) -> list[str]:
    runs = [run for group in groups for run in group.runs]
    notes = ["Unigram: the perplexity of token frequencies alone, which any model has to beat."]
    baseline = baseline_label(groups)
    if any(group.label == baseline and group.runs for group in groups):
        notes.append(
            f"Against {baseline}: the mean of the differences between runs of the same seed. "
            "It uses seeds that both variants have; n is shown if these are fewer."
        )
    if several := [group.name for group in groups if group.runs and len(counterparts(group, baseline, groups)) > 1]:
        notes.append(f"No change is shown for {', '.join(several)}: more than one {baseline} has the same recipe.")
    if not all(math.isfinite(run.perplexity) for run in runs):
        notes.append("NaN (k/n): k of n seeds diverged or have no finite perplexity. The others are not averaged.")
    if _paper_cells(groups):
        notes.append(
            f"Paper: {published.SOURCE}; another corpus and size, so compare changes "
            "(computed from its perplexities), not values."
        )
    corpora = {
        (run.corpus, run.spec["data"].get("expected_fingerprint"))
        for run in runs
        if run.spec["data"].get("source") == "installed"
    }
    notes += [
        f"Corpus {corpus[:12]} is not the one behind the committed results ({expected[:12]}): "
        "compare changes with them, not perplexities."
        for corpus, expected in sorted(corpora, key=str)
        if expected and expected != corpus
    ]
    for group in groups:
        notes += [f"{run.place} is left out: {run.state} at step {run.steps_done}." for run in group.unfinished]
        notes += [f"{r.folder} ({r.status}) is left out: it repeats a seed of {group.name}." for r in group.repeated]
    return notes
