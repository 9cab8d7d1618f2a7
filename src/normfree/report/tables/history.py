"""When and where: the gap in perplexity over training, and heads near uniform over training and over depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from normfree.analysis import published
from normfree.analysis.entropy import Heads, causal_ceiling, probed_heads, top_quarter_share, trained_heads
from normfree.analysis.groups import Group
from normfree.analysis.seeds import paired_difference, summarise
from normfree.report.tables.results import comparable_pairs, comparison, percent, percent_with_interval
from normfree.report.tables.table import Column, Table
from normfree.store.runs import Run

SHARES_OF_TRAINING = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
_REACH = 0.05
"""A measurement stands for a share of training that is at most this far away."""
_DEPTHS = ("Early third", "Middle third", "Late third")
_SHARE_COLUMNS = tuple(Column(f"At {100 * share:.0f} %") for share in SHARES_OF_TRAINING)


def gap_table(groups: Sequence[Group]) -> Table:
    """Paired relative difference of validation perplexity at shares of the training, beside the paper's curves."""
    rows, published_pairs = [], []
    for ours, theirs in comparable_pairs(groups):
        cells = [_gap(ours, theirs, share) for share in SHARES_OF_TRAINING]
        pairs = len(ours.perplexities.keys() & theirs.perplexities.keys())
        rows.append((comparison(ours, theirs), *cells, str(pairs)))
        if all(published.is_gpt2(g.runs[0].spec) and g.label in published.LOSS_NATS for g in (ours, theirs)):
            published_pairs.append((ours.label, theirs.label))
    for label, other in dict.fromkeys(published_pairs):
        losses = (published.LOSS_NATS[label], published.LOSS_NATS[other])
        paper = (percent(math.expm1(losses[0][share] - losses[1][share])) for share in SHARES_OF_TRAINING)
        rows.append((f"{label} against {other}, paper", *paper, "1"))
    columns = (Column("Comparison", numeric=False), *_SHARE_COLUMNS, Column("Pairs"))
    notes = [
        "Validation while training, on a part of the held-out text where train.evaluation_sequences says so; then the "
        "last column is not exactly the final difference. In brackets: 95 % Student-t interval over paired seeds, in "
        "percent.",
        "Each column takes the nearest evaluation within a twentieth of the training; a run that was not "
        "evaluated then, as one that diverged before, makes its pair NaN.",
    ]
    if published_pairs:
        notes.append("Paper: GPT-2 125M, read off a figure, so each difference is good to about 3 points.")
    caption = "Difference in validation perplexity over training (share of the steps)"
    return Table("gap", caption, columns, tuple(rows), tuple(notes))


def overload_table(groups: Sequence[Group]) -> Table:
    """Heads at or above 3/4 of the causal ceiling: by depth after training, and over training."""
    rows, labels = [], []
    for group in groups:
        if not any(probed_heads(run) or trained_heads(run) for run in group.runs):
            continue
        by_depth = zip(*(_by_depth(trained_heads(run)) for run in group.runs), strict=True)
        over_training = (_probed_shares(group, share) for share in SHARES_OF_TRAINING)
        rows.append((group.name, *map(_percent_text, (*by_depth, *over_training)), str(len(group.runs))))
        if published.is_gpt2(group.runs[0].spec) and group.label in published.heatmaps():
            labels.append(group.label)
    for label in dict.fromkeys(labels):
        entropy_LH = published.heatmaps()[label]
        ceiling_L = np.full(len(entropy_LH), causal_ceiling(published.HEATMAP_CONTEXT))
        paper = _by_depth(Heads(entropy_LH, ceiling_L, 0, "final"))
        blanks = ["-"] * len(SHARES_OF_TRAINING)
        rows.append((f"{label}, paper", *(_percent_text([share]) for share in paper), *blanks, "1"))
    depths = map(Column, (*_DEPTHS, "All layers"))
    columns = (Column("Variant", numeric=False), *depths, *_SHARE_COLUMNS, Column("Seeds"))
    notes = [
        "Percent of heads, mean and sample standard deviation over seeds. Thirds and all layers: the large sample "
        "after training; shares of the training: the nearest probe within a twentieth.",
        "Untrained heads are nearly uniform, so a run begins near 100 %. NaN (1/3): 1 of 3 seeds has diverged by "
        "then, was not measured, or has a head that is not finite.",
    ]
    if labels:
        notes.append(f"Paper: {published.SOURCE}; its published heatmaps of 12 x 12 heads.")
    caption = "Heads in the top quarter of the causal ceiling, by depth and over training (%)"
    return Table("overload", caption, columns, tuple(rows), tuple(notes))


def _gap(ours: Group, theirs: Group, share: float) -> str:
    runs = (*ours.runs, *theirs.runs)
    step = _nearest_step(runs, [step for run in runs for step, _ in run.series("validation", "perplexity")], share)
    if step is None:
        return "-"
    of_ours, of_theirs = (
        {seed: _validation(run, step, share) for seed, run in zip(group.perplexities, group.runs, strict=True)}
        for group in (ours, theirs)
    )
    return percent_with_interval(paired_difference(of_ours, of_theirs, relative=True))


def _validation(run: Run, step: int, share: float) -> float:
    """NaN from a divergence on."""
    return dict(run.series("validation", "perplexity")).get(step, math.nan) if _trains(run, step, share) else math.nan


def _probed_shares(group: Group, share: float) -> list[float]:
    """Top-quarter share of each seed then: NaN from a divergence on, an empty list where nobody probed."""
    probes = [(run, {heads.step: heads for heads in probed_heads(run)}) for run in group.runs]
    step = _nearest_step(group.runs, [step for _, probed in probes for step in probed], share)
    if step is None:
        return []
    return [top_quarter_share(probed.get(step) if _trains(run, step, share) else None) for run, probed in probes]


def _nearest_step(runs: Sequence[Run], measured: Sequence[int], share: float) -> int | None:
    """The step nearest to that share of the training, among those at which any of the runs was measured."""
    steps = max(run.facts["steps"] for run in runs)
    nearest = min(measured, key=lambda step: abs(step - share * steps), default=None)
    return None if nearest is None or abs(nearest - share * steps) > _REACH * steps else nearest


def _trains(run: Run, step: int, share: float) -> bool:
    """Whether the run had not diverged by then."""
    return run.status != "diverged" or max(step, share * run.facts["steps"]) < run.facts["divergence"]["step"]


def _by_depth(heads: Heads | None) -> list[float | None]:
    """Top-quarter share of the early, middle and late third of the layers, then of all; None for an empty third.

    Thirds that do not divide are larger at the front.
    """
    if heads is None:
        return [math.nan] * (len(_DEPTHS) + 1)
    layers = np.arange(len(heads.entropy_LH))
    return [
        top_quarter_share(replace(heads, entropy_LH=heads.entropy_LH[some], ceiling_L=heads.ceiling_L[some]))
        if len(some)
        else None
        for some in (*np.array_split(layers, len(_DEPTHS)), layers)
    ]


def _percent_text(shares: Sequence[float | None]) -> str:
    return summarise([100 * share for share in shares if share is not None]).text(1)
