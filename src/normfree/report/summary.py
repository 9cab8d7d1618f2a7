"""What was found, in sentences. Every number in them comes from the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normfree.analysis import published
from normfree.analysis.entropy import top_quarter_share, trained_heads
from normfree.analysis.groups import Group
from normfree.analysis.seeds import Difference, summarise
from normfree.analysis.verdicts import overload
from normfree.report.tables.claims import top_quarter_difference
from normfree.report.tables.results import comparable_pairs, perplexity_difference
from normfree.store.runs import Run, divergence_text

_NAMED = 4
"""Variants with one seed that are named; more are counted."""
_LISTED = 8
"""Variants whose numbers one sentence holds; of more it has the lowest and the highest, and tables have all."""


def sentences(groups: Sequence[Group]) -> list[str]:
    """The findings, most important first; careful where there is one seed, plain where a run diverged."""
    trained = [group for group in groups if group.members[0].kind == "run"]
    pairs = [(a, b) for a, b in comparable_pairs(trained) if published.GELU_OF.get(a.label) == b.label]
    found = [_comparison(a, b) for a, b in sorted(pairs, key=_without_norm_then_most_seeds)]
    found += [_more_uniform(gelu, relu) for relu, gelu in pairs if relu.label == "SM+R"]
    found += [text for text in (_top_quarter(groups), _overloaded(groups)) if text]
    if trained:
        found += [_diverged(group) for group in trained if _diverged_runs(group)]
        found += [text for text in (_floor(trained), _one_seed(trained), _unfinished(trained)) if text]
    return found


def _without_norm_then_most_seeds(pair: tuple[Group, Group]) -> tuple[int, int]:
    ours, theirs = pair
    return tuple(published.GELU_OF).index(ours.label), -len(ours.perplexities.keys() & theirs.perplexities.keys())


def _comparison(ours: Group, theirs: Group) -> str:
    difference = perplexity_difference(ours, theirs)
    # A tag or recipe that tells them apart: once where both have it.
    of_ours, of_theirs = (group.name.removeprefix(group.label) for group in (ours, theirs))
    setting, gelu = f"{published.SETTING[ours.label]}{of_ours}", f"GELU{'' if of_ours == of_theirs else of_theirs}"
    if difference.nonfinite:
        return (
            f"{setting}, ReLU and {gelu} cannot be compared: {difference.nonfinite} of {difference.n} pairs "
            "of runs diverged on one side or both."
        )
    common = ours.perplexities.keys() & theirs.perplexities.keys()
    a, b = (summarise([g.perplexities[key] for key in common]).mean for g in (ours, theirs))
    verb = "below" if difference.mean < 0 else "above"
    seeds = "1 seed" if difference.n == 1 else f"{difference.n} seeds"
    paper = published.relative_difference(published.counterpart(ours.runs[0].spec), ours.label, theirs.label)
    beside = "" if paper is None else f"; the paper: {100 * abs(paper):.1f} % {'below' if paper < 0 else 'above'}"
    size = f"{100 * abs(difference.mean):.1f} %"
    numbers = f"{a:.1f} against {b:.1f}, {seeds}{beside}"
    text = f"{setting}, ReLU ends {size} {verb} {gelu} in perplexity ({numbers})"
    if difference.n < 2:
        return f"{text}."
    if difference.low < 0 < difference.high:
        return f"{text}; the 95 % interval, {_interval(difference)}, includes no difference at all."
    return f"{text}; 95 % interval {_interval(difference)}."


def _interval(difference: Difference) -> str:
    return f"{100 * difference.low:+z.1f} % to {100 * difference.high:+z.1f} %"


def _more_uniform(gelu: Group, relu: Group) -> str:
    """The paper's claim about heads, seed by seed."""
    found = top_quarter_difference(gelu, relu)
    if found.nonfinite:
        return (
            f"Heads of {gelu.name} and {relu.name} in the top quarter of the causal ceiling cannot be compared: not "
            f"measured after training, or not finite, in {found.nonfinite} of {found.n} pairs of runs."
        )
    seeds = "1 seed" if found.n == 1 else f"{found.n} seeds"
    interval = f"; 95 % interval {100 * found.low:+z.1f} to {100 * found.high:+z.1f}" if found.n > 1 else ""
    return (
        f"Heads in the top quarter of the causal ceiling, {gelu.name} less {relu.name}: "
        f"{100 * found.mean:+z.1f} points ({seeds}{interval})."
    )


def _top_quarter(groups: Sequence[Group]) -> str:
    if not any(trained_heads(run) for group in groups for run in group.runs):
        return ""
    found = [
        (group.name, summarise([100 * top_quarter_share(trained_heads(run)) for run in group.runs]))
        for group in groups
        if group.runs
    ]
    texts = [f"{name} {shares.text() if shares.nonfinite else f'{shares.mean:.0f} %'}" for name, shares in found]
    start = "Heads in the top quarter of the causal ceiling, mean over seeds"
    ranked = sorted((shares.mean, text) for text, (_, shares) in zip(texts, found, strict=True) if not shares.nonfinite)
    if len(texts) <= _LISTED or not ranked:
        return f"{start}: {', '.join(texts)}."
    broken = len(texts) - len(ranked)
    rest = f"; NaN in {broken}" if broken else ""
    return f"{start}: from {ranked[0][1]} to {ranked[-1][1]}, {len(texts)} variants in all{rest}."


def _overloaded(groups: Sequence[Group]) -> str:
    if not any(trained_heads(run) for group in groups for run in group.runs):
        return ""
    held, unknown, unmeasured = {}, {}, {}
    for group in groups:
        heads = [trained_heads(run) for run in group.runs]
        verdicts = [overload(found).holds for found in heads if found is not None]
        held[group.name] = (verdicts.count(True), len(heads))
        unknown[group.name] = (verdicts.count(None), len(heads))
        unmeasured[group.name] = (heads.count(None), len(heads))
    parts = [_counted(held, "") or "in no run", _counted(unknown, "undecided "), _counted(unmeasured, "not measured ")]
    return f"Entropic overload of the early layers at the end: {', '.join(filter(None, parts))}."


def _counted(counts: dict[str, tuple[int, int]], word: str) -> str:
    """`SM+G (2 of 3)` of each variant with such a run, or of many variants their number."""
    some = {name: pair for name, pair in counts.items() if pair[0]}
    if len(some) <= _LISTED:
        return ", ".join(f"{name} {word}({found} of {runs})" for name, (found, runs) in some.items())
    runs = sum(found for found, _ in some.values())
    return f"{word}in {runs} of {sum(runs for _, runs in counts.values())} runs, {len(some)} variants"


def _diverged_runs(group: Group) -> list[Run]:
    return [run for run in group.runs if run.status == "diverged"]


def _diverged(group: Group) -> str:
    runs = _diverged_runs(group)
    places = [f"seed {run.seed}, {divergence_text(run.facts['divergence'])}" for run in runs]
    return f"{group.name} diverged in {len(runs)} of {len(group.runs)} runs: {'; '.join(places)}."


def _floor(groups: Sequence[Group]) -> str:
    ended = [(run, group.name) for group in groups for run in group.runs if run.status == "finished"]
    if not ended:
        return "No run finished."
    if broken := [f"{name}, seed {run.seed}" for run, name in ended if not math.isfinite(run.perplexity)]:
        return f"Finished without a finite perplexity: {'; '.join(broken)}."
    floors = [(run.facts["corpus"]["unigram_perplexity"], run, name) for run, name in ended]
    share, name, floor = max((run.perplexity / floor, name, floor) for floor, run, name in floors)
    if share < 1:
        return (
            f"Every finished run learned: the weakest, {name}, ends at {100 * share:.0f} % of the unigram "
            f"perplexity of {floor:.0f}."
        )
    return f"{name} did not learn: it ends at {100 * share:.0f} % of the unigram perplexity of {floor:.0f}."


def _one_seed(groups: Sequence[Group]) -> str:
    with_runs = [group for group in groups if group.runs]
    single = [group.name for group in with_runs if len(group.runs) == 1]
    if not single:
        return ""
    whose = "One seed a variant"
    if len(single) < len(with_runs):
        named = ", ".join(single) if len(single) <= _NAMED else f"{len(single)} of the {len(with_runs)} variants"
        whose = f"One seed of {named}"
    return f"{whose}: there is no error bar, and a small difference may be chance."


def _unfinished(groups: Sequence[Group]) -> str:
    drawn = [f"{run.place} ({run.status})" for group in groups if group.drawn for run in group.unfinished]
    left_out = [f"{run.place} ({run.status})" for group in groups if not group.drawn for run in group.unfinished]
    told = [f"In the curves only, because not finished: {', '.join(drawn)}."] if drawn else []
    if left_out:
        told.append(f"Left out, because not finished and of another recipe or corpus: {', '.join(left_out)}.")
    return " ".join(told)
