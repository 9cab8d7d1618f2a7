"""What came out: perplexity beside the paper's, differences over seeds, heads per range of entropy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from normfree.analysis import published
from normfree.analysis.entropy import NORMALISERS, RANGES, trained_heads
from normfree.analysis.groups import Group, counterparts
from normfree.analysis.published import BASELINE, COMPARISONS
from normfree.analysis.ranges import pooled_ranges
from normfree.analysis.seeds import Difference, paired_difference, summarise
from normfree.report.tables.table import Column, Table


def perplexity_table(groups: Sequence[Group]) -> Table:
    """Final validation perplexity a variant: mean, sample deviation, n, change, the bar of token frequencies.

    The paper's numbers stand beside, unless a variant is there more than once, as in a sweep.
    """
    titles = ("Perplexity", "Seeds", f"Against {BASELINE}", "Bits per byte")
    columns = [Column("Variant", numeric=False), *map(Column, titles)]
    rows = [_perplexity_row(group, groups) for group in groups if group.runs] + _unigram_rows(groups)
    if _has_paper(groups):
        columns += [
            Column("Paper"),
            Column(f"Paper, against {BASELINE}"),
            Column("Paper's model", numeric=False),
        ]
        beside = {group.name: _paper_cells(group) for group in groups if group.runs}
        rows = [(*row, *beside.get(row[0], ("-", "-", "-"))) for row in rows]
    caption = "Validation perplexity after training: mean and sample standard deviation over seeds, lower is better"
    return Table("perplexity", caption, tuple(columns), tuple(rows), _notes(groups))


def difference_table(groups: Sequence[Group]) -> Table:
    """Relative differences of perplexity, paired by seed, with a 95 % Student-t interval."""
    rows = []
    for ours, theirs in comparable_pairs(groups):
        found = perplexity_difference(ours, theirs)
        model = published.counterpart(ours.runs[0].spec)
        paper = published.relative_difference(model, ours.label, theirs.label)
        interval = f"{percent(found.low)} to {percent(found.high)}" if math.isfinite(found.low) else "-"
        rows.append((comparison(ours, theirs), mean_text(found), interval, str(found.n), percent(paper)))
    titles = ("Difference in perplexity", "95 % interval", "Pairs", "Paper")
    columns = (Column("Comparison", numeric=False), *map(Column, titles))
    notes = (
        "Seeds are paired: the same seed and the same order of the data on both sides. "
        "Student's t over the pairs; one pair has no interval.",
    )
    return Table("differences", "Paired relative differences of perplexity", columns, tuple(rows), notes)


def range_table(groups: Sequence[Group]) -> Table:
    """Share of heads per quarter of the maximum under each normaliser, pooled over seeds."""
    pooled, rows = pooled_ranges(groups), []
    for group in groups:
        for normaliser, by_group in pooled.items():
            if found := by_group.get(group.name):
                shares = (f"{100 * share:.1f} %" for share in found.counts.shares)
                of_all = "" if found.seeds == len(group.runs) else f" of {len(group.runs)}"
                counted = (f"{found.seeds}{of_all}", str(found.counts.heads), str(found.counts.nonfinite))
                is_theirs = normaliser == "observed" and published.is_gpt2(group.runs[0].spec)
                beside = published.RANGE_PERCENT.get(group.label) if is_theirs else None
                paper = " / ".join(map(str, beside or "-"))
                rows.append((group.name, normaliser, f"{found.maximum_nats:.3f}", *shares, *counted, paper))
    titles = ("Max (nats)", *RANGES, "Seeds", "Heads", "NaN heads", "Paper, GPT-2 125M (%)")
    columns = (Column("Variant", numeric=False), Column("Normaliser", numeric=False), *map(Column, titles))
    notes = tuple(f"{name}: {meaning}." for name, meaning in NORMALISERS.items())
    if missing := [run.place for group in groups for run in group.runs if trained_heads(run) is None]:
        notes += (f"Not measured after training, so not counted: {', '.join(missing)}.",)
    caption = "Share of heads per quarter of the maximum entropy"
    return Table("ranges", caption, columns, tuple(rows), (*notes, "NaN heads are in no range."))


def comparable_pairs(
    groups: Sequence[Group], comparisons: Iterable[tuple[str, str]] = COMPARISONS
) -> list[tuple[Group, Group]]:
    """The groups behind each comparison of two labels: `counterparts` of each other."""
    ours_first = [(ours, other) for label, other in comparisons for ours in groups if ours.label == label]
    return [(ours, theirs) for ours, other in ours_first for theirs in counterparts(ours, other, groups)]


def perplexity_difference(ours: Group, theirs: Group) -> Difference:
    """Paired relative difference of final perplexity, as a share of `theirs`."""
    return paired_difference(ours.perplexities, theirs.perplexities, relative=True)


def comparison(ours: Group, theirs: Group) -> str:
    """`SM+R against SM+G`; the recipe or tag that both have is said once."""
    same = ours.name.removeprefix(ours.label) == theirs.name.removeprefix(theirs.label)
    return f"{ours.label if same else ours.name} against {theirs.name}"


def percent_with_interval(found: Difference) -> str:
    """`-5.1 % (-8.6 to -1.6)`: a relative difference, and its 95 % interval where it has one."""
    interval = f" ({100 * found.low:+z.1f} to {100 * found.high:+z.1f})" if math.isfinite(found.low) else ""
    return mean_text(found) + interval


def mean_text(found: Difference, unit: str = "%") -> str:
    """`+4.3 %`, or `NaN (1/3)` where 1 of 3 pairs is not finite."""
    return f"NaN ({found.nonfinite}/{found.n})" if found.nonfinite else percent(found.mean, unit)


def percent(share: float | None, unit: str = "%") -> str:
    """`+4.3 %`, or `-` for a share that does not exist."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:+z.1f} {unit}"


def _perplexity_row(group: Group, groups: Sequence[Group]) -> tuple[str, ...]:
    summary = summarise(list(group.perplexities.values()))
    bits = summarise([(run.facts.get("final") or {}).get("bits_per_byte", math.nan) for run in group.runs])
    return group.name, summary.text(), str(summary.n), _against_baseline(group, groups), bits.text(3)


def _has_paper(groups: Sequence[Group]) -> bool:
    """Whether the paper has one of these variants, and each stands for one row of its tables."""
    theirs = [
        (model, group.label)
        for group in groups
        if group.runs and group.label in published.PERPLEXITY[model := published.counterpart(group.runs[0].spec)]
    ]
    return 0 < len(theirs) == len(set(theirs))


def _paper_cells(group: Group) -> tuple[str, str, str]:
    model = published.counterpart(group.runs[0].spec)
    if (paper := published.PERPLEXITY[model].get(group.label)) is None:
        return "-", "-", "-"
    return f"{paper:.3f}", percent(published.relative_difference(model, group.label, BASELINE)), model


def _against_baseline(group: Group, groups: Sequence[Group]) -> str:
    """The mean over the pairs, and their number where not every seed of the group has a partner."""
    if group.label == BASELINE:
        return "baseline"
    bases = counterparts(group, BASELINE, groups)
    if len(bases) != 1:
        return "-"
    found = perplexity_difference(group, bases[0])
    some = not found.nonfinite and 0 < found.n < len(group.perplexities)
    return mean_text(found) + (f" (n = {found.n})" if some else "")


def _unigram_rows(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    corpora = {run.corpus: run.facts["corpus"] for g in groups for run in g.runs}
    rows = []
    for fingerprint, corpus in sorted(corpora.items()):
        name = "Unigram" if len(corpora) == 1 else f"Unigram (corpus {fingerprint[:12]})"
        rows.append((name, f"{corpus['unigram_perplexity']:.2f}", "-", "-", "-"))
    return rows


def _notes(groups: Sequence[Group]) -> tuple[str, ...]:
    notes = ["Unigram: the perplexity of token frequencies alone, which any model has to beat."]
    if any(group.label == BASELINE and group.runs for group in groups):
        notes.append(
            f"Against {BASELINE}: the mean of the differences within a seed, over the seeds that both have; their "
            "number n is given where it is not that of the row."
        )
    if several := [group.name for group in groups if group.runs and len(counterparts(group, BASELINE, groups)) > 1]:
        notes.append(f"More than one {BASELINE} has the recipe and none the tag of {', '.join(several)}.")
    if any(not math.isfinite(run.perplexity) for group in groups for run in group.runs):
        notes.append("NaN (k/n): k of n seeds diverged or have no finite perplexity. The others are not averaged.")
    if _has_paper(groups):
        notes.append(
            f"Paper: {published.SOURCE}; another corpus and size, so compare changes "
            "(computed from its perplexities), not values."
        )
    data_met = [(run.corpus, run.spec["data"]) for group in groups for run in group.runs]
    installed = {
        (corpus, data.get("expected_fingerprint")) for corpus, data in data_met if data.get("source") == "installed"
    }
    notes += [
        f"Corpus {corpus[:12]} is not the one behind the committed results ({expected[:12]}): "
        "compare changes with them, not perplexities."
        for corpus, expected in sorted(installed, key=str)
        if expected and expected != corpus
    ]
    for group in groups:
        notes += [f"{run.place} is left out: {run.status} at step {run.steps_done}." for run in group.unfinished]
        notes += [f"{r.folder} ({r.status}) is left out: it repeats a seed of {group.name}." for r in group.repeated]
    return tuple(notes)
