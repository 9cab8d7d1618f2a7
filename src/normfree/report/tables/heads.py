"""Tables on single layers and heads, for measured models and for the comparison of two models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from normfree.analysis.entropy import OVERLOAD_SHARE, Heads, final_heads, layer_means, shares_of_ceiling
from normfree.analysis.groups import Group
from normfree.analysis.series import newest_values, recorded_quantities
from normfree.report.tables.table import Table
from normfree.store.runs import Run

SHOWN = 10


def layer_table(groups: Sequence[Group]) -> Table:
    """One row per layer of every measured model: entropies, ceiling, heads in its top quarter, non-finite rows."""
    rows = []
    for run, heads in _measured(groups):
        nonfinite_LH = newest_values(run, "nonfinite_rows")
        assert nonfinite_LH is not None
        share_LH, mean_L = shares_of_ceiling(heads), layer_means(heads.entropy_LH)
        for layer, number in enumerate(run.layer_numbers("entropy_nats", len(share_LH))):
            entropy_H = heads.entropy_LH[layer]
            nats = (mean_L[layer], entropy_H.min(), entropy_H.max(), heads.ceiling_L[layer])
            near = f"{int((share_LH[layer] >= OVERLOAD_SHARE).sum())} of {len(entropy_H)}"
            nonfinite = str(int(nonfinite_LH[layer].sum()))
            rows.append((run.label, str(number), *(f"{value:.3f}" for value in nats), near, nonfinite))
    titles = ("Model", "Layer", "Mean", "Lowest", "Highest", "Ceiling", "Top quarter", "Non-finite rows")
    notes = ["A layer with a head that is not finite has no mean. Layers and heads count from 0."]
    return Table("layers", "Entropy of each layer, in nats", titles, rows, notes)


def extreme_head_table(groups: Sequence[Group]) -> Table:
    """The ten highest and the ten lowest heads of every measured model, by their share of the ceiling."""
    others = [q for q in recorded_quantities(groups, drawn="folded") if q.axes == ("layer", "head")]
    rows = []
    for run, heads in _measured(groups):
        share_LH, numbers = shares_of_ceiling(heads), run.layer_numbers("entropy_nats", len(heads.entropy_LH))
        finite = [(float(share), index) for index, share in np.ndenumerate(share_LH) if np.isfinite(share)]
        ordered = sorted(finite, reverse=True)
        count = min(SHOWN, len(ordered) // 2) or len(ordered)
        values = [newest_values(run, q.name) for q in others]
        for kind, extremes in (("highest", ordered[:count]), ("lowest", ordered[::-1][:count])):
            for share, (layer, head) in extremes:
                entropy = (f"{heads.entropy_LH[layer, head]:.3f}", f"{100 * share:.0f} %")
                more = ("-" if v is None else f"{v[layer, head]:.3f}" for v in values)
                rows.append((run.label, kind, str(numbers[layer]), str(head), *entropy, *more))
    titles = ("Model", "Entropy", "Layer", "Head", "Nats", "Of the ceiling", *(q.label for q in others))
    return Table("heads", "Heads with the highest and the lowest entropy", titles, rows, words=("Entropy",))


def head_pair(groups: Sequence[Group], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64], list[int]] | None:
    """The values of a quantity in two models, and the numbers of the layers.

    None unless there are two models that have it for the same heads.
    """
    runs = [group.shown for group in groups if group.shown is not None]
    values = [newest_values(run, name) for run in runs]
    if len(values) != 2 or values[0] is None or values[1] is None or values[0].shape != values[1].shape:
        return None
    return values[0], values[1], runs[0].layer_numbers(name, len(values[0]))


def mover_table(groups: Sequence[Group]) -> Table:
    """The heads whose entropy differs most between two models; no row for any other number of models."""
    rows, names = [], ["-", "-"]
    pair = head_pair(groups, "entropy_nats") if len(groups) == 2 else None
    if pair is not None:
        first_LH, second_LH, numbers = pair
        names = [group.name for group in groups]
        difference_LH = first_LH - second_LH
        finite = [index for index, value in np.ndenumerate(difference_LH) if np.isfinite(value)]
        for index in sorted(finite, key=lambda index: -abs(difference_LH[index]))[: 2 * SHOWN]:
            nats = (f"{first_LH[index]:.3f}", f"{second_LH[index]:.3f}", f"{difference_LH[index]:+.3f}")
            rows.append((f"layer {numbers[index[0]]} head {index[1]}", *nats))
    titles = ("Head", *names, "Difference")
    return Table("movers", "Heads whose entropy differs most, in nats", titles, rows)


def _measured(groups: Sequence[Group]) -> list[tuple[Run, Heads]]:
    runs = [run for group in groups for run in group.runs if run.kind == "measurement"]
    return [(run, heads) for run in runs if (heads := final_heads(run)) is not None]
