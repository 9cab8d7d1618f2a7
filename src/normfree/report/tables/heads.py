"""Tables on single layers and heads: of models that were measured once, and of two models side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from normfree.analysis.entropy import Heads, final_heads, layer_means, shares_of_ceiling
from normfree.analysis.groups import Group
from normfree.analysis.quantities import newest_values, recorded_quantities
from normfree.analysis.verdicts import OVERLOAD_SHARE
from normfree.report.tables.table import Column, Table
from normfree.store.runs import Run

SHOWN = 10


def layer_table(groups: Sequence[Group]) -> Table:
    """One row a layer of every measured model: entropies, the ceiling, heads in its top quarter, non-finite rows."""
    names = ("Mean", "Lowest", "Highest", "Ceiling", "Top quarter", "Non-finite rows")
    rows = []
    for run, heads in _measured(groups):
        broken_LH = newest_values(run, "nonfinite_rows")
        assert broken_LH is not None
        share_LH, mean_L = shares_of_ceiling(heads), layer_means(heads.entropy_LH)
        for layer, number in enumerate(run.layer_numbers("entropy_nats", len(share_LH))):
            entropy_H = heads.entropy_LH[layer]
            nats = (mean_L[layer], entropy_H.min(), entropy_H.max(), heads.ceiling_L[layer])
            broken = int(broken_LH[layer].sum())
            near = f"{int((share_LH[layer] >= OVERLOAD_SHARE).sum())} of {len(entropy_H)}"
            rows.append((run.label, str(number), *(f"{value:.3f}" for value in nats), near, str(broken)))
    columns = (Column("Model", numeric=False), Column("Layer"), *(Column(name) for name in names))
    notes = ("A layer with a head that is not finite has no mean. Layers and heads count from 0.",)
    return Table("layers", "Entropy of each layer, in nats", columns, tuple(rows), notes)


def extreme_head_table(groups: Sequence[Group]) -> Table:
    """The ten highest and the ten lowest heads of every measured model, by their share of the ceiling."""
    measured = _measured(groups)
    beside = [q for q in recorded_quantities(groups, drawn="folded") if q.axes == ("layer", "head")]
    rows = []
    for run, heads in measured:
        share_LH, numbers = shares_of_ceiling(heads), run.layer_numbers("entropy_nats", len(heads.entropy_LH))
        finite = [(float(share), index) for index, share in np.ndenumerate(share_LH) if np.isfinite(share)]
        ordered = sorted(finite, reverse=True)
        count = min(SHOWN, len(ordered) // 2) or len(ordered)
        values = {q.name: newest_values(run, q.name) for q in beside}
        for kind, chosen in (("highest", ordered[:count]), ("lowest", ordered[::-1][:count])):
            for share, (layer, head) in chosen:
                row = [run.label, kind, str(numbers[layer]), str(head)]
                row += [f"{heads.entropy_LH[layer, head]:.3f}", f"{100 * share:.0f} %"]
                row += ["-" if v is None else f"{v[layer, head]:.3f}" for v in values.values()]
                rows.append(tuple(row))
    columns = (Column("Model", numeric=False), Column("Entropy", numeric=False), Column("Layer"), Column("Head"))
    columns += (Column("Nats"), Column("Of the ceiling"), *(Column(q.label) for q in beside))
    return Table("heads", "Heads with the highest and the lowest entropy", columns, tuple(rows))


def head_pair(groups: Sequence[Group], name: str) -> tuple[NDArray[np.float64], list[int]] | None:
    """A number a head of the first of two models less that of the second, and the numbers of the layers.

    None unless both have it for the same heads.
    """
    runs = [group.shown for group in groups if group.shown is not None]
    values = [newest_values(run, name) for run in runs]
    if len(values) != 2 or values[0] is None or values[1] is None or values[0].shape != values[1].shape:
        return None
    return values[0] - values[1], runs[0].layer_numbers(name, len(values[0]))


def mover_table(groups: Sequence[Group]) -> Table:
    """The heads whose entropy differs most between two models; no row for any other number of models."""
    pair = head_pair(groups, "entropy_nats") if len(groups) == 2 else None
    rows, names = [], ["-", "-"]
    if pair is not None:
        difference_LH, numbers = pair
        names = [group.name for group in groups]
        first, second = (newest_values(group.shown, "entropy_nats") for group in groups if group.shown is not None)
        assert first is not None
        assert second is not None
        places = [index for index, value in np.ndenumerate(difference_LH) if np.isfinite(value)]
        for layer, head in sorted(places, key=lambda index: -abs(difference_LH[index]))[: 2 * SHOWN]:
            nats = (first[layer, head], second[layer, head])
            cells = (*(f"{value:.3f}" for value in nats), f"{difference_LH[layer, head]:+.3f}")
            rows.append((f"layer {numbers[layer]} head {head}", *cells))
    columns = (Column("Head", numeric=False), *(Column(name) for name in names), Column("Difference"))
    return Table("movers", "Heads whose entropy differs most, in nats", columns, tuple(rows))


def _measured(groups: Sequence[Group]) -> list[tuple[Run, Heads]]:
    runs = [run for group in groups for run in group.runs if run.kind == "measurement"]
    return [(run, heads) for run in runs if (heads := final_heads(run)) is not None]
