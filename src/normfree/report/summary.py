"""The findings of a report in sentences. Every number in them comes from the runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from normfree.analysis import published
from normfree.analysis.entropy import Heads, top_quarter_share, trained_heads
from normfree.analysis.groups import Group
from normfree.analysis.seeds import summarise
from normfree.analysis.verdicts import overload
from normfree.report.tables.results import all_pairs, baseline_label, perplexity_difference
from normfree.store.runs import divergence_text

_LISTED = 8
"""A sentence names at most this many variants; of more it gives the extremes or a count."""
_OVERLOAD = {True: "overloaded", False: "not overloaded", None: "undecided"}


def question(groups: Sequence[Group]) -> str:
    """The question that the first sentence answers."""
    if all(group.members[0].kind == "measurement" for group in groups):
        return "Which heads attend evenly, and which to single tokens?"
    if any(group.is_baseline for group in groups):
        return f"How does each variant compare with {baseline_label(groups)}?"
    pairs = _compared(groups)
    if pairs and pairs[0][0].label in published.GELU_OF and pairs[0][1].label == published.GELU_OF[pairs[0][0].label]:
        return f"{published.SETTING[pairs[0][0].label]}, does ReLU or GELU end with the lower perplexity?"
    return "Which variant ends with the lower perplexity?" if pairs else "What did these runs learn?"


def sentences(groups: Sequence[Group]) -> list[str]:
    """The findings, most important first."""
    trained = [group for group in groups if group.members[0].kind == "run"]
    findings = [_comparison(a, b) for a, b in _compared(trained)]
    heads = {group.name: [trained_heads(run) for run in group.runs] for group in groups if group.runs}
    if any(measured for of_group in heads.values() for measured in of_group):
        findings += [_near_uniform(heads), _overloaded(heads)]
    if trained:
        findings += map(_diverged, trained)
        findings += [_floor(trained), _one_seed(trained), *_unfinished(trained)]
    return [sentence for sentence in findings if sentence]


def _compared(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Pairs with a sentence: ReLU against GELU, or each variant against the baseline, or the first other pairs."""
    trained = [group for group in groups if group.members[0].kind == "run"]
    pairs = all_pairs(trained)
    if not any(group.is_baseline for group in trained):
        gelu = [(a, b) for a, b in pairs if published.GELU_OF.get(a.label) == b.label]
        if gelu:
            return sorted(gelu, key=_without_norm_then_most_seeds)
    return sorted(pairs, key=lambda pair: -len(pair[0].perplexities.keys() & pair[1].perplexities.keys()))[:_LISTED]


def _without_norm_then_most_seeds(pair: tuple[Group, Group]) -> tuple[int, int]:
    ours, theirs = pair
    return tuple(published.GELU_OF).index(ours.label), -len(ours.perplexities.keys() & theirs.perplexities.keys())


def _comparison(ours: Group, theirs: Group) -> str:
    difference = perplexity_difference(ours, theirs)
    subject, other = ours.name, theirs.name
    if published.GELU_OF.get(ours.label) == theirs.label:
        # A tag or recipe that distinguishes them is named once if both have it.
        ours_more, theirs_more = (group.name.removeprefix(group.label) for group in (ours, theirs))
        subject = f"{published.SETTING[ours.label]}{ours_more}, ReLU"
        other = "GELU" if ours_more == theirs_more else f"GELU{theirs_more}"
    if difference.nonfinite:
        pairs = f"{difference.nonfinite} of {difference.n} pairs"
        return f"{subject} and {other} cannot be compared: {pairs} of runs diverged on one side or both."
    common = ours.perplexities.keys() & theirs.perplexities.keys()
    a, b = (summarise([g.perplexities[key] for key in common]).mean for g in (ours, theirs))
    paper = published.relative_difference(published.counterpart(ours.runs[0].spec), ours.label, theirs.label)
    beside = "" if paper is None else f"; the paper: {_above_or_below(paper)}"
    seeds = "1 seed" if difference.n == 1 else f"{difference.n} seeds"
    numbers = f"{a:.1f} against {b:.1f}, {seeds}{beside}"
    text = f"{subject} ends {_above_or_below(difference.mean)} {other} in perplexity ({numbers})"
    if difference.n < 2:
        return f"{text}."
    interval = f"{100 * difference.low:+z.1f} % to {100 * difference.high:+z.1f} %"
    if difference.low < 0 < difference.high:
        return f"{text}; the 95 % interval, {interval}, includes 0."
    return f"{text}; 95 % interval {interval}."


def _above_or_below(share: float) -> str:
    return f"{100 * abs(share):.1f} % {'below' if share < 0 else 'above'}"


def _near_uniform(heads: dict[str, list[Heads | None]]) -> str:
    shares = {name: summarise([100 * top_quarter_share(h) for h in of_group]) for name, of_group in heads.items()}
    texts = {name: f"{name} {s.text() if s.nonfinite else f'{s.mean:.0f} %'}" for name, s in shares.items()}
    ranked = sorted((s.mean, texts[name]) for name, s in shares.items() if not s.nonfinite)
    mean = ", mean over seeds" if any(len(of_group) > 1 for of_group in heads.values()) else ""
    start = f"Near-uniform heads (in the top quarter of the causal ceiling){mean}"
    if len(texts) <= _LISTED or not ranked:
        return f"{start}: {', '.join(texts.values())}."
    return f"{start}: from {ranked[0][1]} to {ranked[-1][1]}; the table has all {len(texts)} variants."


def _overloaded(heads: dict[str, list[Heads | None]]) -> str:
    """How many runs of each variant are overloaded, undecided and not measured; of many variants only the sum."""
    counts = {
        name: Counter("not measured" if h is None else _OVERLOAD[overload(h).holds] for h in of_group)
        for name, of_group in heads.items()
    }
    if len(counts) > _LISTED:
        counts = {"all variants": sum(counts.values(), Counter())}
    parts = []
    for name, verdicts in counts.items():
        others = [f"{verdicts[word]} {word}" for word in ("undecided", "not measured") if verdicts[word]]
        parts.append(", ".join([f"{name} {verdicts['overloaded']} of {verdicts.total()} runs", *others]))
    return f"Early layers are overloaded with near-uniform heads at the end: {'; '.join(parts)}."


def _diverged(group: Group) -> str:
    runs = [run for run in group.runs if run.status == "diverged"]
    places = [f"seed {run.seed}, {divergence_text(run.facts['divergence'])}" for run in runs]
    return f"{group.name} diverged in {len(runs)} of {len(group.runs)} runs: {'; '.join(places)}." if runs else ""


def _floor(groups: Sequence[Group]) -> str:
    """Whether the finished runs learned more than token frequencies."""
    ended = [(run, group.name) for group in groups for run in group.runs if run.status == "finished"]
    if not ended:
        return "No run finished."
    if broken := [f"{name}, seed {run.seed}" for run, name in ended if not math.isfinite(run.perplexity)]:
        return f"Finished without a finite perplexity: {'; '.join(broken)}."
    floors = [(run.perplexity / run.facts["corpus"]["unigram_perplexity"], name, run) for run, name in ended]
    share, name, run = max(floors, key=lambda floor: floor[0])
    bar = f"{100 * share:.0f} % of the unigram perplexity of {run.facts['corpus']['unigram_perplexity']:.0f}"
    failed = list(dict.fromkeys(name for share, name, _ in floors if share >= 1))
    if not failed:
        return f"Every finished run learned: the weakest, {name}, ends at {bar}."
    if len(failed) == len({name for _, name, _ in floors}):
        return f"These runs are too short to judge: no variant learned, and the weakest, {name}, ends at {bar}."
    return f"{', '.join(failed)} did not learn: the weakest, {name}, ends at {bar}."


def _one_seed(groups: Sequence[Group]) -> str:
    with_runs = [group for group in groups if group.runs]
    single = [group.name for group in with_runs if len(group.runs) == 1]
    if not single:
        return ""
    names = ", ".join(single) if len(single) <= _LISTED else f"{len(single)} of the {len(with_runs)} variants"
    whose = f"One seed of {names}" if len(single) < len(with_runs) else "One seed per variant"
    return f"{whose}: there is no error bar, and a small difference may be chance."


def _unfinished(groups: Sequence[Group]) -> list[str]:
    runs = [(run, group.drawn) for group in groups for run in group.unfinished]
    drawn = [f"{run.place} ({run.state} at step {run.steps_done})" for run, is_drawn in runs if is_drawn]
    left_out = [f"{run.place} ({run.state} at step {run.steps_done})" for run, is_drawn in runs if not is_drawn]
    return [
        f"Not finished, so only in the curves: {', '.join(drawn)}." if drawn else "",
        f"Not finished and of another recipe or corpus, so left out: {', '.join(left_out)}." if left_out else "",
    ]
