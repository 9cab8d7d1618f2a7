"""Tables of what private inference costs: by operation, by layer, by matrix product, and against perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from normfree.cost.counts import Matmul
from normfree.cost.totals import Cost, Item
from normfree.cost.tradeoff import TradeOff
from normfree.report.tables.table import Column, Table, to_markdown

_COLUMNS = tuple(map(Column, ("Calls", "Elements", "GB", "% of bytes", "Rounds")))


def operation_cost_table(cost: Cost) -> Table:
    """One row per operation and place in the model, summed over layers."""
    groups = _grouped(cost.items, lambda item: (item.count.operation, item.count.part))
    rows = [(*names, *_cells(cost, items)) for names, items in groups.items()]
    columns = (Column("Operation", numeric=False), Column("Where", numeric=False), *_COLUMNS)
    rows.append(("all", "", *_cells(cost, cost.items)))
    return Table("cost-operations", _caption(cost, "by operation"), columns, tuple(rows))


def layer_cost_table(cost: Cost) -> Table:
    """One row per layer; what lies outside the blocks has rows of its own."""
    rows = [(name, *_cells(cost, items)) for name, items in _grouped(cost.items, _place).items()]
    rows.append(("all", *_cells(cost, cost.items)))
    return Table("cost-layers", _caption(cost, "by layer"), (Column("Where", numeric=False), *_COLUMNS), tuple(rows))


def matmul_cost_table(cost: Cost) -> Table:
    """Shapes of the matrix products, with how often each occurs."""
    groups = _grouped([item for item in cost.items if isinstance(item.count, Matmul)], _shape)
    rows = tuple((name, *_cells(cost, items)) for name, items in groups.items())
    columns = (Column("batch x (m x k)(k x n)", numeric=False), *_COLUMNS)
    return Table("cost-matmuls", _caption(cost, "matrix products"), columns, rows)


def cost_markdown(cost: Cost) -> str:
    """All tables of one model's cost, the assumptions and the lower bound of the time."""
    network = cost.network
    bound = (
        f"Lower bound of time on {network.name} ({network.bandwidth_mbps:g} Mbps each way, {network.delay_ms:g} ms one "
        f"way): {cost.seconds_at_least:,.1f} s for these bytes and rounds; no prediction."
    )
    tables = [to_markdown(make(cost)) for make in (operation_cost_table, layer_cost_table, matmul_cost_table)]
    return "\n".join([*tables, cost.assumptions, "", bound]) + "\n"


def trade_off_table(found: TradeOff) -> Table:
    """One row per point; the Pareto front is marked in words."""
    titles = map(Column, ("Perplexity", "n", "GB", "Rounds"))
    columns = (Column("Variant", numeric=False), *titles, Column("Pareto front", numeric=False))
    rows = []
    for point in found.points:
        perplexity = f"{point.perplexity:.2f}" if math.isfinite(point.perplexity) else "NaN"
        numbers = (perplexity, f"{point.seeds}", gigabytes(point.bytes), f"{point.rounds}")
        rows.append((point.name, *numbers, "yes" if point.on_front else "no"))
    notes = [
        "Perplexity: mean over the n seeds that all variants on the corpus have; over its own where none is common.",
        "Pareto front: no other variant on the same corpus is at least as low in both perplexity and bytes, and lower "
        "in one.",
        "GELU is priced as the model computes it; its tanh form is cheaper than its erf form "
        "(docs/private-inference.md).",
    ]
    notes += [f"{name} is left out: an operation of it has no price." for name in found.unpriced]
    caption = "Perplexity against communication in private inference (cheetah)"
    return Table("perplexity-communication", caption, columns, tuple(rows), tuple(notes))


def _cells(cost: Cost, items: Iterable[Item]) -> tuple[str, ...]:
    items = list(items)
    transferred = sum(item.bytes for item in items)
    return (
        f"{len(items)}",
        f"{sum(item.count.elements for item in items):,}",
        gigabytes(transferred),
        f"{100 * transferred / cost.bytes:.1f}",
        f"{sum(item.rounds for item in items)}",
    )


def _caption(cost: Cost, what: str) -> str:
    return f"{cost.architecture.family}, T={cost.context}, {cost.protocol.name}: {what}"


def gigabytes(transferred: float) -> str:
    """Three significant digits of GB or more."""
    value = transferred / 1e9
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _place(item: Item) -> str:
    return item.count.part if item.count.layer is None else f"layer {item.count.layer}"


def _shape(item: Item) -> str:
    assert isinstance(item.count, Matmul)
    return f"{item.count.batch} x ({item.count.m} x {item.count.k})({item.count.k} x {item.count.n})"
