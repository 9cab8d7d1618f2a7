"""Tables over training: the gap in perplexity, and heads near uniform, also by depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from normfree.analysis import published
from normfree.analysis.entropy import Heads, causal_ceiling, probed_heads, top_quarter_share, trained_heads
from normfree.analysis.groups import Group
from normfree.analysis.seeds import paired_difference, summarise
from normfree.report.tables.results import comparison, main_pairs, percent, percent_with_interval
from normfree.report.tables.table import Table
from normfree.store.runs import Run

SHARES_OF_TRAINING = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
_REACH = 0.05
"""A measurement at most this share of training away counts."""
_DEPTHS = ("Early third", "Middle third", "Late third")
_SHARE_TITLES = tuple(f"At {100 * share:.0f} %" for share in SHARES_OF_TRAINING)


def gap_table(groups: Sequence[Group]) -> Table:
    """Paired relative difference of validation perplexity at shares of the training, beside the paper's curves."""
    rows, published_pairs = [], []
    for ours, theirs in main_pairs(groups):
        cells = [_gap(ours, theirs, share) for share in SHARES_OF_TRAINING]
        pairs = len(ours.perplexities.keys() & theirs.perplexities.keys())
        rows.append((comparison(ours, theirs), *cells, str(pairs)))
        if all(published.is_gpt2(g.runs[0].spec) and g.label in published.LOSS_NATS for g in (ours, theirs)):
            published_pairs.append((ours.label, theirs.label))
    for label, other in dict.fromkeys(published_pairs):
        losses = (published.LOSS_NATS[label], published.LOSS_NATS[other])
        paper = (percent(math.expm1(losses[0][share] - losses[1][share])) for share in SHARES_OF_TRAINING)
        rows.append((f"{label} against {other}, paper", *paper, "1"))
    notes = [
        "Validation during training, on part of the held-out text if train.evaluation_sequences is set; then the "
        "last column is not exactly the final difference. In brackets: 95 % Student-t interval over paired seeds, in "
        "percent.",
        "Each column takes the nearest evaluation within a twentieth of the training. If either run has no evaluation "
        "there, for example because it diverged before, the pair is NaN.",
    ]
    if published_pairs:
        notes.append("Paper: GPT-2 125M, read off a figure, so each difference is good to about 3 points.")
    caption = "Difference in validation perplexity over training (share of the steps)"
    return Table("gap", caption, ("Comparison", *_SHARE_TITLES, "Pairs"), rows, notes)


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
        paper = _by_depth(Heads(entropy_LH, ceiling_L, step=0))
        blanks = ["-"] * len(SHARES_OF_TRAINING)
        rows.append((f"{label}, paper", *(_percent_text([share]) for share in paper), *blanks, "1"))
    notes = [
        "Percent of heads, mean and sample standard deviation over seeds. Thirds and all layers: the large sample "
        "after training. Shares of training: the nearest probe within a twentieth of the training.",
        "Untrained heads are nearly uniform, so a run begins near 100 %. NaN (1/3): 1 of 3 seeds diverged before, "
        "was not measured, or has a head that is not finite.",
    ]
    if labels:
        notes.append(f"Paper: {published.SOURCE}; its published heatmaps of 12 x 12 heads.")
    caption = "Heads in the top quarter of the causal ceiling, by depth and over training (%)"
    titles = ("Variant", *_DEPTHS, "All layers", *_SHARE_TITLES, "Seeds")
    return Table("overload", caption, titles, rows, notes)


def _gap(ours: Group, theirs: Group, share: float) -> str:
    runs = (*ours.runs, *theirs.runs)
    step = _nearest_step(runs, [step for run in runs for step, _ in run.series("validation", "perplexity")], share)
    if step is None:
        return "-"
    perplexities = []
    for group in (ours, theirs):
        curves = [dict(run.series("validation", "perplexity")) for run in group.runs]
        values = [
            curve.get(step, math.nan) if _is_training(run, step, share) else math.nan
            for run, curve in zip(group.runs, curves, strict=True)
        ]
        perplexities.append(dict(zip(group.perplexities, values, strict=True)))
    return percent_with_interval(paired_difference(*perplexities, relative=True))


def _probed_shares(group: Group, share: float) -> list[float]:
    """Top-quarter share of each seed at that time: NaN after a divergence, an empty list if no run was probed."""
    probes = [(run, {heads.step: heads for heads in probed_heads(run)}) for run in group.runs]
    step = _nearest_step(group.runs, [step for _, probed in probes for step in probed], share)
    if step is None:
        return []
    return [top_quarter_share(probed.get(step) if _is_training(run, step, share) else None) for run, probed in probes]


def _nearest_step(runs: Sequence[Run], measured: Sequence[int], share: float) -> int | None:
    """The measured step nearest to that share of training, or None if it is too far away."""
    steps = max(run.facts["steps"] for run in runs)
    nearest = min(measured, key=lambda step: abs(step - share * steps), default=None)
    return None if nearest is None or abs(nearest - share * steps) > _REACH * steps else nearest


def _is_training(run: Run, step: int, share: float) -> bool:
    """Whether the run had not diverged by then."""
    return run.status != "diverged" or max(step, share * run.facts["steps"]) < run.facts["divergence"]["step"]


def _by_depth(heads: Heads | None) -> list[float | None]:
    """Top-quarter share of the early, middle and late third of the layers, then of all; None for an empty third."""
    if heads is None:
        return [math.nan] * (len(_DEPTHS) + 1)
    layers = np.arange(len(heads.entropy_LH))
    shares = []
    for part in (*np.array_split(layers, len(_DEPTHS)), layers):
        some = replace(heads, entropy_LH=heads.entropy_LH[part], ceiling_L=heads.ceiling_L[part])
        shares.append(top_quarter_share(some) if len(part) else None)
    return shares


def _percent_text(shares: Sequence[float | None]) -> str:
    return summarise([100 * share for share in shares if share is not None]).text(1)
