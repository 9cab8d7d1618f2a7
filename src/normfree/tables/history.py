"""When and where: the gap in perplexity over training, and heads near uniform over training and over depth."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from normfree import published
from normfree.analysis import (
    Floats,
    Group,
    causal_ceiling,
    final_heads,
    paired_difference,
    probed_heads,
    summarise,
    top_quarter_share,
)
from normfree.records import Run
from normfree.tables.results import comparable_pairs, percent
from normfree.tables.table import Column, Table

SHARES_OF_TRAINING = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
_REACH = 0.05
"""A measurement stands for a share of training that is at most this far away."""
_DEPTHS = ("Early third", "Middle third", "Late third")


def gap_table(groups: Sequence[Group]) -> Table:
    """Paired relative difference of validation perplexity at shares of the training, beside the paper's curves."""
    rows = []
    for ours, theirs in comparable_pairs(groups):
        cells = [_gap(ours, theirs, share) for share in SHARES_OF_TRAINING]
        pairs = len(ours.perplexities.keys() & theirs.perplexities.keys())
        rows.append((f"{ours.name} against {theirs.name}", *cells, str(pairs)))
        if ours.label in published.LOSS_NATS and theirs.label in published.LOSS_NATS:
            paper = (_published_gap(ours.label, theirs.label, share) for share in SHARES_OF_TRAINING)
            rows.append((f"{ours.label} against {theirs.label}, paper", *paper, "1"))
    columns = (Column("Comparison", numeric=False), *_share_columns(), Column("Pairs"))
    notes = (
        "Validation while training, on a part of the held-out text, so the last column is not exactly the final "
        "difference. In brackets: 95 % Student-t interval over paired seeds.",
        "Each column takes the nearest evaluation within a twentieth of the training.",
        "Paper: GPT-2 125M, read off a figure, so each difference is good to about 3 points.",
    )
    caption = "Difference in validation perplexity over training (share of the steps)"
    return Table("gap", caption, columns, tuple(rows), notes)


def overload_table(groups: Sequence[Group]) -> Table:
    """Heads at or above 3/4 of the causal ceiling: by depth after training, and over training."""
    rows = []
    for group in groups:
        measured = [(run, heads) for run in group.runs if (heads := final_heads(run)) is not None]
        if not measured:
            continue
        by_depth = np.array([_by_depth(heads.entropy_LH, heads.ceiling_L) for _, heads in measured]).T
        over_training = [[_probed_share(run, share) for run, _ in measured] for share in SHARES_OF_TRAINING]
        cells = [_percent_text(values) for values in (*by_depth.tolist(), *over_training)]
        rows.append((group.name, *cells, str(len(measured))))
        if group.label in published.heatmaps():
            ceiling = causal_ceiling(published.HEATMAP_CONTEXT)
            paper = _by_depth(published.heatmaps()[group.label], ceiling)
            blanks = ["-"] * len(SHARES_OF_TRAINING)
            rows.append((f"{group.label}, paper", *(f"{100 * share:.1f}" for share in paper), *blanks, "1"))
    depths = (Column(title) for title in (*_DEPTHS, "All layers"))
    columns = (Column("Variant", numeric=False), *depths, *_share_columns(), Column("Seeds"))
    notes = (
        "Percent of heads, mean and sample standard deviation over seeds. Thirds and all layers: the large sample "
        "after training; shares of the training: the nearest probe within a twentieth.",
        "Untrained heads are nearly uniform, so every run begins at 100 %.",
        f"Paper: {published.SOURCE}; its published heatmaps of 12 x 12 heads.",
    )
    caption = "Heads in the top quarter of the causal ceiling, by depth and over training (%)"
    return Table("overload", caption, columns, tuple(rows), notes)


def _share_columns() -> list[Column]:
    return [Column(f"At {100 * share:.0f} %") for share in SHARES_OF_TRAINING]


def _gap(ours: Group, theirs: Group, share: float) -> str:
    of_ours, of_theirs = _validations(ours, share), _validations(theirs, share)
    if not of_ours.keys() & of_theirs.keys():
        return "-"
    found = paired_difference(of_ours, of_theirs, relative=True)
    if found.nonfinite:
        return f"NaN ({found.nonfinite}/{found.n})"
    interval = f" ({100 * found.low:+.1f} to {100 * found.high:+.1f})" if math.isfinite(found.low) else ""
    return percent(found.mean) + interval


def _published_gap(label: str, other: str, share: float) -> str:
    return percent(math.expm1(published.LOSS_NATS[label][share] - published.LOSS_NATS[other][share]))


def _validations(group: Group, share: float) -> dict[Hashable, float]:
    """Perplexity of each seed at that share of training; NaN from a divergence on, absent where none was taken."""
    found = {}
    for seed, run in zip(group.perplexities, group.runs, strict=True):
        step = _nearest(run, run.series("validation", "perplexity"), share)
        if step is not None:
            found[seed] = dict(run.series("validation", "perplexity"))[step]
        elif run.status == "diverged" and share * _steps(run) > run.facts["divergence"]["step"]:
            found[seed] = math.nan
    return found


def _probed_share(run: Run, share: float) -> float:
    probes = {heads.step: heads for heads in probed_heads(run)}
    step = _nearest(run, list(probes.items()), share)
    return math.nan if step is None else top_quarter_share(probes[step].entropy_LH, probes[step].ceiling_L)


def _nearest(run: Run, series: Sequence[tuple[int, Any]], share: float) -> int | None:
    """The step of `series` nearest to that share of the run's training."""
    wanted, reach = share * _steps(run), _REACH * _steps(run)
    near = [step for step, _ in series if abs(step - wanted) <= reach]
    return min(near, key=lambda step: abs(step - wanted)) if near else None


def _steps(run: Run) -> int:
    return run.facts["steps"]


def _by_depth(entropy_LH: Floats, ceiling: Floats | float) -> list[float]:
    """Top-quarter share of the early, middle and late third of the layers, then of all; early ones are rounded up."""
    ceiling_L = np.broadcast_to(ceiling, len(entropy_LH))
    thirds = np.array_split(np.arange(len(entropy_LH)), 3)
    return [
        top_quarter_share(entropy_LH[layers], ceiling_L[layers]) if len(layers) else math.nan
        for layers in (*thirds, np.arange(len(entropy_LH)))
    ]


def _percent_text(shares: Sequence[float]) -> str:
    return summarise([100 * share for share in shares]).text(1)
