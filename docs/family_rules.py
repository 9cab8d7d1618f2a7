"""The rules of docs/study.md for vision transformers and encoder-decoders: is overload a decoder's disease?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

from docs.confirm import LABELS, Comparison, check_all_ended, compare, log_score
from normfree.analysis.entropy import group_and_number, top_quarter_share, trained_heads
from normfree.analysis.groups import Group, all_runs
from normfree.store.runs import Run

SEEDS = 3
LAYERS = 2
"""The first third of a vision transformer's six layers, the first half of an encoder's four."""
MARGIN = 10.0
"""In points: below it, overload counts as a decoder's."""
LOWEST_ACCURACY, LARGEST_SHARE_OF_UNIGRAM = 88.0, 0.5
"""Bars for SM+LN+G's mean: accuracy in percent, or perplexity as a share of the unigram's."""


def judge(groups: Sequence[Group]) -> list[tuple[Comparison, str]]:
    """Each comparison with its verdict, the overload of the first group of heads first.

    Raises ValueError before all runs of a study have a result, or if SM+LN+G was not trained well enough.
    """
    runs = {label: [run for run in all_runs(groups) if run.label == label] for label in LABELS}
    for label, of_label in runs.items():
        check_all_ended(label, of_label, SEEDS)
    baseline = [run for run in runs["SM+LN+G"] if run.status == "finished"]
    if not baseline:
        raise ValueError("all runs of SM+LN+G diverged: nothing is judged")
    in_percent, mean = baseline[0].headline.higher_is_better, fmean(run.score for run in baseline)
    needed = LOWEST_ACCURACY
    if not in_percent:
        needed = LARGEST_SHARE_OF_UNIGRAM * baseline[0].facts["corpus"]["unigram_perplexity"]
    if not (mean >= needed if in_percent else mean < needed):
        raise ValueError(f"SM+LN+G ends at {mean:.2f} on average, and {needed:.2f} is needed: nothing is judged")
    return [*_overload(groups, baseline[0]), *_relu(groups, in_percent=in_percent)]


def near_uniform(stack: int, run: Run) -> float:
    """Percent of the heads near uniform in the first layers of a stack; NaN for a run that did not finish."""
    heads = trained_heads(run)
    return math.nan if heads is None else 100 * top_quarter_share(heads.groups[stack].part(range(LAYERS)))


def _overload(groups: Sequence[Group], run: Run) -> list[tuple[Comparison, str]]:
    heads = trained_heads(run)
    assert heads is not None  # it finished
    judged = []
    for stack, of_stack in enumerate(heads.groups):
        name = group_and_number(of_stack.layers[0])[0]
        title = f"SM+G less SM+LN+G, heads near uniform in the first two layers{name and f' ({name})'}, points"
        gap = compare(title, groups, ("SM+G", "SM+LN+G"), partial(near_uniform, stack), paired=True)
        one_head = 100 / int(of_stack.part(range(LAYERS)).existing.sum())
        # Shares move in steps of one head: without their rounding, equal differences would have no spread.
        rounding = one_head / math.sqrt(12 * max(gap.n, 1))
        gap = replace(gap, standard_error=max(gap.standard_error, rounding))
        low, high = gap.interval()
        verdict = "not a decoder's alone" if low > 0 else "a decoder's" if high < MARGIN else "open"
        judged.append((gap, "beside" if stack else verdict))
    return judged


def _relu(groups: Sequence[Group], *, in_percent: bool) -> list[tuple[Comparison, str]]:
    value = (lambda run: run.score) if in_percent else log_score
    judged = []
    for labels, wins_in_decoders in ((("SM+R", "SM+G"), True), (("SM+LN+R", "SM+LN+G"), False)):
        title = f"{labels[0]} less {labels[1]}, {'accuracy, points' if in_percent else 'ln perplexity'}"
        difference = compare(title, groups, labels, value, paired=True)
        low, high = difference.interval()
        as_in_decoders, reverse = low > 0, high < 0
        if in_percent != wins_in_decoders:
            as_in_decoders, reverse = reverse, as_in_decoders
        judged.append((difference, "as in decoders" if as_in_decoders else "the reverse" if reverse else "open"))
    return judged
