"""The findings of a report in sentences. Every number in them comes from the runs."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from normfree.analysis import published
from normfree.analysis.entropy import Heads, ceiling_words, top_quarter_share, trained_heads
from normfree.analysis.groups import Group, all_runs, score_of
from normfree.analysis.pairs import Pair, all_pairs, baseline_label
from normfree.analysis.seeds import summarise
from normfree.analysis.verdicts import LEARNED_WORDS, WORDS, bar_to_learn, overload
from normfree.report.tables.results import interval_text
from normfree.store.runs import divergence_text

_LISTED = 8  # a sentence names at most this many variants; of more it gives the extremes or a count


def question(groups: Sequence[Group]) -> str:
    """The question that the first sentence answers."""
    if not any(group.is_trained for group in groups):
        has_heads = any(trained_heads(run) for run in all_runs(groups))
        return "Which heads attend evenly, and which to single tokens?" if has_heads else "What does each layer do?"
    if any(group.is_baseline for group in groups):
        return f"How does each variant compare with {baseline_label(groups)}?"
    pairs, better = _compared(groups), f"{score_of(groups).better} {score_of(groups).name}"
    if pairs and _is_relu_against_gelu(pairs[0]):
        return f"{published.SETTING[pairs[0].ours.label]}, does ReLU or GELU end with the {better}?"
    return f"Which variant ends with the {better}?" if pairs else "What did these runs learn?"


def sentences(groups: Sequence[Group]) -> list[str]:
    """The findings, most important first."""
    findings = [_comparison(pair) for pair in _compared(groups)]
    heads = {group.name: [trained_heads(run) for run in group.runs] for group in groups if group.runs}
    if any(measured for of_group in heads.values() for measured in of_group):
        findings += [_near_uniform(heads, ceiling_words(all_runs(groups))), _overloaded(heads)]
    if trained := [group for group in groups if group.is_trained]:
        learned = _learned(trained)
        findings.insert(0 if LEARNED_WORDS[None] in learned else len(findings), learned)
        findings += [*map(_diverged, trained), _one_seed(trained), _unfinished(trained)]
    return [sentence for sentence in findings if sentence]


def _compared(groups: Sequence[Group]) -> list[Pair]:
    """Pairs with a sentence: ReLU against GELU, or each variant against the baseline, or the first other pairs."""
    trained = [group for group in groups if group.is_trained]
    pairs = sorted(all_pairs(trained), key=lambda pair: -len(pair.seeds))
    gelu = [pair for pair in pairs if _is_relu_against_gelu(pair)]
    if gelu and not any(group.is_baseline for group in trained):
        return sorted(gelu, key=lambda pair: list(published.GELU_OF).index(pair.ours.label))
    return pairs[:_LISTED]


def _is_relu_against_gelu(pair: Pair) -> bool:
    return published.GELU_OF.get(pair.ours.label) == pair.theirs.label


def _comparison(pair: Pair) -> str:
    difference, subject, other, score = pair.score(), pair.ours.name, pair.theirs.name, pair.ours.score
    if _is_relu_against_gelu(pair):
        # A tag or recipe that distinguishes them is named once if both have it.
        ours_more, theirs_more = (group.name.removeprefix(group.label) for group in (pair.ours, pair.theirs))
        subject = f"{published.SETTING[pair.ours.label]}{ours_more}, ReLU"
        other = "GELU" if ours_more == theirs_more else f"GELU{theirs_more}"
    if difference.nonfinite:
        pairs = f"{difference.nonfinite} of {difference.n} pairs"
        return f"{subject} and {other} cannot be compared: {pairs} of runs diverged on one side or both."
    a, b = (summarise([group.scores[seed] for seed in pair.seeds]).mean for group in (pair.ours, pair.theirs))
    beside = "" if pair.published is None else f"; the paper: {_above_or_below(pair.published, '%')}"
    numbers = f"{a:.1f} against {b:.1f}, {difference.n} seed{'s' if difference.n > 1 else ''}{beside}"
    text = f"{subject} ends {_above_or_below(difference.mean, score.unit)} {other} in {score.name} ({numbers})"
    if difference.n < 2:
        return f"{text}."
    includes = ", includes 0" if difference.low < 0 < difference.high else ""
    return f"{text}; 95 % interval {interval_text(difference)} {score.unit}{includes}."


def _above_or_below(share: float, unit: str) -> str:
    return f"{100 * abs(share):.1f} {unit} {'below' if share < 0 else 'above'}"


def _near_uniform(heads: Mapping[str, Sequence[Heads | None]], ceiling: str) -> str:
    shares = {name: summarise([100 * top_quarter_share(h) for h in of_group]) for name, of_group in heads.items()}
    texts = {name: f"{name} {s.text() if s.nonfinite else f'{s.mean:.0f} %'}" for name, s in shares.items()}
    ranked = sorted((s.mean, texts[name]) for name, s in shares.items() if not s.nonfinite)
    mean = ", mean over seeds" if any(len(of_group) > 1 for of_group in heads.values()) else ""
    start = f"Near-uniform heads (in the top quarter of the {ceiling}){mean}"
    if len(texts) <= _LISTED or not ranked:
        return f"{start}: {', '.join(texts.values())}."
    return f"{start}: from {ranked[0][1]} to {ranked[-1][1]}; the table has all {len(texts)} variants."


def _overloaded(heads: Mapping[str, Sequence[Heads | None]]) -> str:
    """How many runs of each variant are overloaded, undecided and not measured; of many variants only the sum."""
    counts = {
        name: Counter("not measured" if h is None else WORDS[overload(h).holds] for h in of_group)
        for name, of_group in heads.items()
    }
    whole = sum(counts.values(), Counter())
    if len(counts) > 1 and set(whole) in ({"yes"}, {"no"}):
        runs = f"in all {whole.total()} runs" if whole["yes"] else f"in none of the {whole.total()} runs"
        return f"Early layers are overloaded with near-uniform heads at the end {runs}."
    if len(counts) > _LISTED:
        counts = {"all variants": whole}
    parts = []
    for name, verdicts in counts.items():
        others = [f"{verdicts[word]} {word}" for word in ("undecided", "not measured") if verdicts[word]]
        parts.append(", ".join([f"{name} {verdicts['yes']} of {verdicts.total()} runs", *others]))
    return f"Early layers are overloaded with near-uniform heads at the end: {'; '.join(parts)}."


def _diverged(group: Group) -> str:
    runs = [run for run in group.runs if run.status == "diverged"]
    places = [f"seed {run.seed}, {divergence_text(run.facts['divergence'])}" for run in runs]
    return f"{group.name} diverged in {len(runs)} of {len(group.runs)} runs: {'; '.join(places)}." if runs else ""


def _learned(groups: Sequence[Group]) -> str:
    """Whether the finished runs learned more than counting tokens or classes gives."""
    ended = [(run, group.name) for group in groups for run in group.runs if run.status == "finished"]
    if not ended:
        return "No run finished." if groups else ""
    score = score_of(groups)
    if broken := [f"{name}, seed {run.seed}" for run, name in ended if not math.isfinite(run.score)]:
        return f"Finished without a finite {score.name}: {'; '.join(broken)}."
    shares = [(run.score / bar_to_learn(run)[1], name, run) for run, name in ended]
    _, name, run = (min if score.higher_is_better else max)(shares, key=lambda entry: entry[0])
    yardstick, bar = bar_to_learn(run)
    weakest = f"the weakest, {name}, ends at {score.name} {run.score:.1f}, the {yardstick} has {bar:.1f}"
    fails = (1.0).__ge__ if score.higher_is_better else (1.0).__le__
    failed = list(dict.fromkeys(name for share, name, _ in shares if fails(share)))
    if not failed:
        return f"Every finished run {LEARNED_WORDS[True]}: {weakest}."
    if len(failed) == len({name for _, name, _ in shares}):
        return f"These runs are {LEARNED_WORDS[None]}: {weakest}."
    return f"{', '.join(failed)} {LEARNED_WORDS[False]}: {weakest}."


def _one_seed(groups: Sequence[Group]) -> str:
    with_runs = [group for group in groups if group.runs]
    single = [group.name for group in with_runs if len(group.runs) == 1]
    if not single:
        return ""
    names = ", ".join(single) if len(single) <= _LISTED else f"{len(single)} of the {len(with_runs)} variants"
    whose = f"One seed of {names}" if len(single) < len(with_runs) else "One seed per variant"
    return f"{whose}: there is no error bar, and a small difference may be chance."


def _unfinished(groups: Sequence[Group]) -> str:
    places = [f"{run.place} ({run.state} at step {run.steps_done})" for group in groups for run in group.unfinished]
    return f"Not finished, so only in the curves: {', '.join(places)}." if places else ""
