"""Tables of results: scores, differences, claims, ranges of entropy; also over training."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from normfree.analysis import entropy, published
from normfree.analysis.entropy import Heads, probed_heads, shares_by_depth, top_quarter_share, trained_heads
from normfree.analysis.groups import Group, all_runs, counterparts, rate_grids, score_of
from normfree.analysis.pairs import CLAIMS, Pair, all_pairs, baseline_label, main_pairs, pairs_of
from normfree.analysis.seeds import Difference, compact, paired_difference, summarise
from normfree.analysis.verdicts import CLAIM_WORDS, claim_holds, yardsticks
from normfree.report.tables.table import Table
from normfree.store.runs import Run

SHARES_OF_TRAINING = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
_REACH = 0.05  # a measurement at most this share of training away counts


def score_table(groups: Sequence[Group]) -> Table:
    """Final score of each variant, its change against the baseline, and what counting tokens or classes reaches.

    The baseline is the one chosen for the groups, else the paper's. The paper's changes are added, unless the runs have
    a variant more than once, as in a sweep.
    """
    with_runs, baseline, score = [group for group in groups if group.runs], baseline_label(groups), score_of(groups)
    paper = _changes_in_paper(with_runs, baseline) if any(group.label == baseline for group in with_runs) else {}
    titles = ("Variant", score.name.capitalize(), "Seeds", f"Against {baseline}", score.beside[1])
    titles += (f"Paper, against {baseline}", "Paper's model")
    rows = []
    for group in with_runs:
        summary = summarise(list(group.scores.values()))
        beside = summarise([(run.facts.get("final") or {}).get(score.beside[0], math.nan) for run in group.runs])
        cells = (summary.text(), str(summary.n), _against_baseline(group, baseline, groups), beside.text(3))
        rows.append((group.name, *cells, *paper.get(group.name, "--")))
    corpora = {run.corpus: run for group in with_runs for run in group.runs}
    for fingerprint, run in sorted(corpora.items()):
        more = "" if len(corpora) == 1 else f" (corpus {fingerprint[:12]})"
        rows += [(f"{name}{more}", f"{value:.2f}", *"-----") for name, value in yardsticks(run).items()]
    what = score.axis[0].upper() + score.axis[1:]
    caption = f"{what} after training: mean and sample standard deviation over seeds, {score.better} is better"
    notes = _score_notes(groups, baseline, has_paper=bool(paper))
    return Table(score.name, caption, titles, rows, notes, words=("Paper's model",))


def difference_table(groups: Sequence[Group]) -> Table:
    """Differences of the score for all pairs, paired by seed, with a 95 % Student-t interval."""
    rows, score = [], score_of(groups)
    for pair in all_pairs(groups):
        numbers = (*_difference_cells(pair.score(), score.unit), percent(pair.published))
        rows.append((pair.name, "the paper's" if pair.is_the_papers else "exploratory", *numbers))
    titles = ("Comparison", "Kind", f"Difference in {score.name}", "95 % interval", "Pairs", "Paper")
    notes = [
        "Seeds are paired: the same seed and order of the data on both sides. One pair has no interval.",
        "Exploratory: the paper makes no claim about this pair.",
    ]
    kind = "relative differences" if score.relative else "differences"
    return Table("differences", f"Paired {kind} of {score.name}", titles, rows, notes, words=("Kind",))


def claim_table(groups: Sequence[Group]) -> Table:
    """The paper's claims that these runs can test, each with a verdict that the 95 % interval decides."""
    rows, score = [], score_of(groups)
    for claim in CLAIMS:
        of_score = claim.measure is Pair.score
        measured, unit = (score.name, score.unit) if of_score else ("share of heads", "points")
        above = claim.above != (of_score and score.higher_is_better)
        for pair in pairs_of(groups, [claim.labels]):
            difference = claim.measure(pair)
            verdict = CLAIM_WORDS[claim_holds(difference, above=above)]
            rows.append((claim.text, verdict, pair.name, measured, *_difference_cells(difference, unit)))
    ceiling = entropy.ceiling_words(run for group in groups for run in group.runs)
    titles = ("Claim", "Verdict", "Compared", "Measured", "Difference", "95 % interval", "Pairs")
    notes = [
        "Holds or does not hold: the 95 % Student-t interval over paired seeds lies entirely on one side of 0. "
        "Undecided: it contains 0, or there is only one pair, or a run diverged. The interval is valid only if the "
        "number of seeds was fixed in advance, and for its own claim: one in twenty misses a true 0.",
        f"Share of heads: those at or above 3/4 of the {ceiling}; the difference is in percentage points.",
    ]
    if not all(group.members[0].family.causal for group in groups) or not score.relative:
        others = "perplexities of targets" if score.relative else "accuracies"
        notes.append(f"The paper's claims are about perplexities of decoders; here they are tested on {others}.")
    return Table("claims", "The paper's claims at this scale", titles, rows, notes, words=titles[:4])


def range_table(groups: Sequence[Group]) -> Table:
    """Share of heads per quarter of the maximum under each normaliser, pooled over seeds."""
    rows = []
    pooled = entropy.pooled_ranges(groups)
    missing = [run.place for group in groups for run in group.runs if trained_heads(run) is None]
    for group in groups:
        seeds = str(sum(run.place not in missing for run in group.runs))
        for normaliser, counts in pooled.get(group.name, {}).items():
            shares = (f"{100 * share:.1f} %" for share in counts.shares)
            cells = (f"{counts.maximum_nats:.3f}", *shares, seeds, str(counts.heads), str(counts.nonfinite))
            comparable = normaliser == "observed" and published.is_gpt2(group.runs[0].spec)
            paper = published.RANGE_PERCENT.get(group.label) if comparable else None
            rows.append((group.name, normaliser, *cells, " / ".join(map(str, paper or "-"))))
    heads = ("Seeds", "Heads", "NaN heads", "Paper, GPT-2 125M (%)")
    titles = ("Variant", "Normaliser", "Max (nats)", *entropy.RANGES, *heads)
    used = {normaliser for counts in pooled.values() for normaliser in counts}
    notes = [f"{name}: {meaning}." for name, meaning in entropy.NORMALISERS.items() if name in used]
    if missing:
        notes.append(f"Not measured after training, so not counted: {', '.join(missing)}.")
    notes.append("NaN heads are in no range.")
    return Table("ranges", "Share of heads per quarter of the maximum entropy", titles, rows, notes, ("Normaliser",))


def rate_table(groups: Sequence[Group]) -> Table:
    """Final score at each peak learning rate of variants that have several, and the rate with the best."""
    grids, rows, score = rate_grids(groups), [], score_of(groups)
    best_word = "highest" if score.higher_is_better else "lowest"
    best_title = f"{best_word.capitalize()} at"
    notes = [
        "Mean over the seeds that a variant has at all of its rates. NaN (k/n): k of n seeds diverged.",
        f"{best_title}: {best_word} mean log {score.name}, if no seed diverged. "
        "Edge of the grid: a rate beyond may be better.",
    ]
    rates = sorted({rate for grid in grids.values() for rate in grid})
    for name, grid in grids.items():
        common = set.intersection(*map(set, grid.values()))
        values: dict[float, list[float]] = {}
        for rate, of_seed in grid.items():
            ends = {seed: runs[0].score for seed, runs in of_seed.items()}
            values[rate] = [end for seed, end in ends.items() if seed in common or not math.isfinite(end)]
            repeated = [run.place for runs in of_seed.values() for run in runs[1:]]
            notes += [f"{place} is left out: it repeats a seed of {name} at {compact(rate)}." for place in repeated]
        means = {rate: math.prod(ends) ** (1 / len(ends)) for rate, ends in values.items() if ends}
        finite = [rate for rate in means if math.isfinite(means[rate])]
        best = (max if score.higher_is_better else min)(finite, key=means.__getitem__, default=math.nan)
        lowest = f"{compact(best)}{', edge of the grid' * (best in (min(grid), max(grid)))}" if best in grid else "-"
        rows.append((name, *(summarise(values.get(rate, [])).text() for rate in rates), str(len(common)), lowest))
    titles = ("Variant", *map(compact, rates), "Seeds", best_title)
    what = score.axis[0].upper() + score.axis[1:]
    return Table("rates", f"{what} at each peak learning rate", titles, rows, notes, titles[-1:])


def percent_with_interval(difference: Difference, unit: str = "%") -> str:
    """`-5.1 % (-8.6 to -1.6)`: a relative difference, and its 95 % interval if it has one."""
    interval = interval_text(difference)
    return mean_text(difference, unit) + (f" ({interval})" if interval else "")


def interval_text(difference: Difference) -> str:
    """`-8.6 to -1.6`: the 95 % interval in percent or points; empty if there is none."""
    low, high = difference.low, difference.high
    return f"{100 * low:+z.1f} to {100 * high:+z.1f}" if math.isfinite(low) else ""


def _difference_cells(difference: Difference, unit: str) -> tuple[str, ...]:
    interval = interval_text(difference)
    return mean_text(difference, unit), f"{interval} {unit}" if interval else "-", str(difference.n)


def mean_text(difference: Difference, unit: str = "%") -> str:
    """`+4.3 %`, or `NaN (1/3)` if 1 of 3 pairs is not finite."""
    if difference.nonfinite:
        return f"NaN ({difference.nonfinite}/{difference.n})"
    return percent(difference.mean, unit)


def percent(share: float | None, unit: str = "%") -> str:
    """`+4.3 %`, or `-` for NaN or None."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:+z.1f} {unit}"


def _changes_in_paper(groups: Sequence[Group], baseline: str) -> dict[str, tuple[str, str]]:
    """The paper's change and its model by group; empty if the paper has none of them, or one of them twice."""
    models = {group.name: published.counterpart(group.members[0].spec) for group in groups}
    in_paper = [g for g in groups if g.label in published.PERPLEXITY.get(models[g.name], {}) and g.score.relative]
    if len({(models[group.name], group.label) for group in in_paper}) < len(in_paper):
        return {}
    changes = {g.name: published.relative_difference(models[g.name], g.label, baseline) for g in in_paper}
    return {name: (percent(change), models[name]) for name, change in changes.items()}


def _against_baseline(group: Group, baseline: str, groups: Sequence[Group]) -> str:
    """The mean over the pairs, with their number if some seeds of the group have no partner."""
    bases = counterparts(group, baseline, groups)
    if group.label == baseline or len(bases) != 1:
        return "baseline" if group.label == baseline else "-"
    difference = Pair(group, bases[0]).score()
    some = not difference.nonfinite and 0 < difference.n < len(group.scores)
    return mean_text(difference, group.score.unit) + (f" (n = {difference.n})" if some else "")


def _score_notes(groups: Sequence[Group], baseline: str, *, has_paper: bool) -> list[str]:
    runs = [run for group in groups for run in group.runs]
    notes = ["Unigram and n-grams: counted on the training text; a model has learned if it beats the 2-gram."]
    if not any("2-gram" in yardsticks(run) for run in runs):
        notes = ["Unigram: the perplexity of token frequencies alone, which any model has to beat."]
    if score_of(groups).higher_is_better:
        notes = ["Majority: the most frequent class of the training for all, which any model has to beat."]
        if any("token_accuracy" in (run.facts.get("final") or {}) for run in runs):
            notes[0] += " Class of each token: the most frequent one of this token in the training."
    if any(group.label == baseline and group.runs for group in groups):
        notes.append(f"Against {baseline}: the mean over seeds that both variants have; n is shown if these are fewer.")
    if several := [group.name for group in groups if group.runs and len(counterparts(group, baseline, groups)) > 1]:
        notes.append(f"No change is shown for {', '.join(several)}: more than one {baseline} has the same recipe.")
    if not all(math.isfinite(run.score) for run in runs):
        name = score_of(groups).name
        notes.append(f"NaN (k/n): k of n seeds diverged or have no finite {name}. The others are not averaged.")
    if has_paper:
        notes.append(f"Paper: {published.SOURCE}; another corpus and size, so only changes can be compared.")
    expected = {
        (run.corpus, run.spec["data"].get("expected_fingerprint"))
        for run in runs
        if run.spec["data"].get("source") != "files"  # a text of one's own is meant to be another
    }
    notes += [
        f"Corpus {corpus[:12]} is not the one behind the committed results ({other[:12]}): "
        "compare changes with them, not perplexities."
        for corpus, other in sorted(expected, key=str)
        if other and other != corpus
    ]
    for group in groups:
        notes += [f"{run.place} is left out: {run.state} at step {run.steps_done}." for run in group.unfinished]
        notes += [f"{r.folder} ({r.status}) is left out: it repeats a seed of {group.name}." for r in group.repeated]
    return notes


def gap_table(groups: Sequence[Group]) -> Table:
    """Paired difference of the validation score at shares of the training."""
    pairs, score = main_pairs(groups), score_of(groups)
    rows = [(pair.name, *(_gap(pair, share) for share in SHARES_OF_TRAINING), str(len(pair.seeds))) for pair in pairs]
    if not any(run.series("validation", score.name) for run in all_runs(groups)):  # of classifiers of text
        rows = []
    notes = [
        "Validation during training, on part of the held-out data if train.evaluation_sequences is set. In brackets: "
        f"95 % Student-t interval over paired seeds, in {'percent' if score.relative else 'points'}.",
        "Each column takes the nearest evaluation within a twentieth of the training (in brackets: tokens). A pair is "
        "NaN if one of its runs has none there, for example because it diverged before.",
    ]
    caption = f"Difference in validation {score.name} over training (share of the steps)"
    return Table("gap", caption, ("Comparison", *_share_titles(groups), "Pairs"), rows, notes)


def overload_table(groups: Sequence[Group]) -> Table:
    """Heads at or above 3/4 of the causal ceiling: by depth after training, and over training."""
    rows, labels, baseline = [], [], baseline_label(groups)
    for group in groups:
        if not any(probed_heads(run) or trained_heads(run) for run in group.runs):
            continue
        *by_depth, everywhere = zip(*(shares_by_depth(trained_heads(run)) for run in group.runs), strict=True)
        curves = [{heads.step: top_quarter_share(heads) for heads in probed_heads(run)} for run in group.runs]
        over_training = (_at_share(group.runs, curves, share) for share in SHARES_OF_TRAINING)
        excess = _early_excess(group, baseline, groups)
        cells = map(_percent_text, (everywhere, *over_training))
        rows.append((group.name, *map(_percent_text, by_depth), excess, *cells, str(len(group.runs))))
        if published.is_gpt2(group.runs[0].spec) and group.label in published.heatmaps():
            labels.append(group.label)
    for label in dict.fromkeys(labels):
        entropy_LH = published.heatmaps()[label]
        ceiling_L = np.full(len(entropy_LH), entropy.causal_ceiling(published.HEATMAP_CONTEXT))
        paper = shares_by_depth(Heads(entropy_LH, ceiling_L, step=0, layers=range(len(entropy_LH))))
        *by_depth, everywhere = (_percent_text([share]) for share in paper)
        rows.append((f"{label}, paper", *by_depth, "-", everywhere, *["-"] * len(SHARES_OF_TRAINING), "1"))
    notes = [
        "Percent of heads, mean and sample standard deviation over seeds. Thirds and all layers: the large sample "
        "after training. Shares of training (in brackets: tokens): the nearest probe within a twentieth of it.",
        f"Early, less {baseline}: what a variant has above it in the early third, in points over the seeds of both; "
        "untrained heads are near uniform too, so the share alone says little.",
        "NaN (1/3): 1 of 3 seeds diverged before, was not measured, or has a head that is not finite.",
    ]
    if labels:
        notes.append(f"Paper: {published.SOURCE}; its published heatmaps of 12 x 12 heads.")
    ceiling = entropy.ceiling_words(run for group in groups for run in group.runs)
    caption = f"Heads in the top quarter of the {ceiling}, by depth and over training (%)"
    depths = ("Early third", "Middle third", "Late third", f"Early, less {baseline}", "All layers")
    titles = ("Variant", *depths, *_share_titles(groups), "Seeds")
    return Table("overload", caption, titles, rows, notes)


def _share_titles(groups: Sequence[Group]) -> list[str]:
    """`At 40 % (4.1 M)` tokens; the share alone if the runs have several lengths, or read less than a million."""
    planned = {run.facts["steps"] * run.tokens_per_step for run in all_runs(groups)}
    titles = [f"At {100 * share:.0f} %" for share in SHARES_OF_TRAINING]
    tokens = max(planned, default=0)
    if len(planned) != 1 or tokens < 1e6:
        return titles
    return [f"{t} ({share * tokens / 1e6:.1f} M)" for t, share in zip(titles, SHARES_OF_TRAINING, strict=True)]


def _early_excess(group: Group, baseline: str, groups: Sequence[Group]) -> str:
    bases = counterparts(group, baseline, groups)
    if group.label == baseline or len(bases) != 1:
        return "-"
    early = (each.by_seed(lambda run: shares_by_depth(trained_heads(run))[0]) for each in (group, bases[0]))
    shares = [{seed: share for seed, share in of_seed.items() if share is not None} for of_seed in early]
    difference = paired_difference(*shares)
    return mean_text(difference, "points") if difference.n else "-"  # groups of heads have no common depth


def _gap(pair: Pair, share: float) -> str:
    runs, count = (*pair.ours.runs, *pair.theirs.runs), len(pair.ours.runs)
    score = pair.ours.score
    values = _at_share(runs, [dict(run.series("validation", score.name)) for run in runs], share)
    ours = dict(zip(pair.ours.scores, values[:count], strict=False))
    theirs = dict(zip(pair.theirs.scores, values[count:], strict=False))
    return percent_with_interval(paired_difference(ours, theirs, relative=score.relative), score.unit)


def _at_share(runs: Sequence[Run], curves: Sequence[Mapping[int, float]], share: float) -> list[float]:
    """Each run's value at the step nearest to that share of training, NaN after a divergence; empty if none is near."""
    goal = share * max(run.facts["steps"] for run in runs)
    near = [step for curve in curves for step in curve if abs(step - goal) <= _REACH * goal / share]
    if not near:
        return []
    nearest = min(near, key=lambda step: abs(step - goal))
    values = []
    for run, curve in zip(runs, curves, strict=True):
        place = max(nearest, share * run.facts["steps"])
        is_over = run.status == "diverged" and place >= run.facts["divergence"]["step"]
        values.append(math.nan if is_over else curve.get(nearest, math.nan))
    return values


def _percent_text(shares: Sequence[float | None]) -> str:
    return summarise([100 * share for share in shares if share is not None]).text(1)
