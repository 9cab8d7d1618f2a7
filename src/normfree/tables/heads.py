"""Tables on the heads of one model."""

from __future__ import annotations

import numpy as np

from normfree.analysis import (
    NORMALISERS,
    OVERLOAD_SHARE,
    RANGES,
    Heads,
    layer_means,
    normaliser_maxima,
    range_counts,
    shares_of_ceiling,
)
from normfree.tables.table import Column, Table

SHOWN = 10


def layer_table(heads: Heads, *, layers: list[int], nonfinite_rows: list[list[int]]) -> Table:
    """One row a layer: mean, lowest and highest entropy, the ceiling, heads in its top quarter, non-finite rows."""
    names = ("Mean", "Lowest", "Highest", "Causal ceiling", "Top quarter", "Non-finite rows")
    share_LH = shares_of_ceiling(heads)
    rows = tuple(
        (
            str(layer),
            f"{mean:.3f}",
            f"{entropy_H.min():.3f}",
            f"{entropy_H.max():.3f}",
            f"{ceiling:.3f}",
            f"{int((share_H >= OVERLOAD_SHARE).sum())} of {len(share_H)}",
            str(sum(broken_H)),
        )
        for layer, mean, entropy_H, ceiling, share_H, broken_H in zip(
            layers,
            layer_means(heads.entropy_LH),
            heads.entropy_LH,
            heads.ceiling_L,
            share_LH,
            nonfinite_rows,
            strict=True,
        )
    )
    columns = (Column("Layer", numeric=False), *(Column(name) for name in names))
    notes = ("A layer with a head that is not finite has no mean. Layers and heads count from 0.",)
    return Table("layers", "Entropy of each layer, in nats", columns, rows, notes)


def head_range_table(heads: Heads, *, context: int) -> Table:
    """Shares of heads per quarter of the maximum, under the three normalisers."""
    rows = []
    for name, meaning in NORMALISERS.items():
        maximum_L = normaliser_maxima(name, [heads], [context])[0]
        counts = range_counts(heads.entropy_LH, maximum_L)
        shares = [f"{100 * share:.0f} %" for share in counts.shares]
        rows.append((name, f"{np.fmax.reduce(maximum_L):.3f}", *shares, str(counts.nonfinite), meaning))
    columns = (Column("Normaliser", numeric=False), Column("Maximum"), *(Column(name) for name in RANGES))
    columns += (Column("Non-finite heads"), Column("Meaning", numeric=False))
    return Table("ranges", "Share of heads in each quarter of the maximum", columns, tuple(rows))


def extreme_head_table(
    heads: Heads, *, layers: list[int], distance: list[list[float]] | None, first_mass: list[list[float]] | None
) -> Table:
    """The ten heads nearest to the causal ceiling and the ten nearest to collapse, by their share of it."""
    share_LH = shares_of_ceiling(heads)
    finite = [(float(share), index) for index, share in np.ndenumerate(share_LH) if np.isfinite(share)]
    ordered = sorted(finite, reverse=True)
    count = min(SHOWN, len(ordered) // 2) or len(ordered)
    rows = []
    for kind, chosen in (("nearest to the ceiling", ordered[:count]), ("nearest to collapse", ordered[::-1][:count])):
        for share, (layer, head) in chosen:
            row = [kind, str(layers[layer]), str(head), f"{heads.entropy_LH[layer, head]:.3f}", f"{100 * share:.0f} %"]
            row += [f"{distance[layer][head]:.1f}" if distance else "-"]
            row += [f"{first_mass[layer][head]:.3f}" if first_mass else "-"]
            rows.append(tuple(row))
    names = ("Layer", "Head", "Nats", "Of the ceiling", "Mean distance", "First-token mass")
    columns = (Column("Kind", numeric=False), *(Column(name) for name in names))
    notes = ("Mean distance: tokens from a query to where it attends. First-token mass: attention on the first token.",)
    return Table("heads", "Heads nearest to the causal ceiling, and nearest to collapse", columns, tuple(rows), notes)
