"""Tables of the cost of private inference: by operation, by layer, by matrix product, and against perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from normfree.analysis.groups import Group
from normfree.cost.counts import Matmul
from normfree.cost.totals import Cost, Item
from normfree.cost.tradeoff import trade_off
from normfree.report.tables.table import Table, to_markdown

_TITLES = ("Calls", "Elements", "GB", "% of bytes", "Rounds")


def operation_cost_table(cost: Cost) -> Table:
    """One row per operation and place in the model, summed over layers."""
    rows = _grouped_rows(cost, cost.items, lambda item: (item.count.operation, item.count.part))
    caption = f"{_model(cost)}: by operation"
    total = ("all", "", *_cells(cost, cost.items))
    return Table("cost-operations", caption, ("Operation", "Where", *_TITLES), [*rows, total], words=("Where",))


def layer_cost_table(cost: Cost) -> Table:
    """One row per layer, and one for each part outside the blocks."""

    def place(item: Item) -> tuple[str]:
        return (item.count.part if item.count.layer is None else f"layer {item.count.layer}",)

    rows = [*_grouped_rows(cost, cost.items, place), ("all", *_cells(cost, cost.items))]
    return Table("cost-layers", f"{_model(cost)}: by layer", ("Where", *_TITLES), rows)


def matmul_cost_table(cost: Cost) -> Table:
    """One row per shape of a matrix product."""

    def shape(item: Item) -> tuple[str]:
        assert isinstance(item.count, Matmul)
        return (f"{item.count.batch} x ({item.count.m} x {item.count.k})({item.count.k} x {item.count.n})",)

    rows = _grouped_rows(cost, [item for item in cost.items if isinstance(item.count, Matmul)], shape)
    return Table("cost-matmuls", f"{_model(cost)}: matrix products", ("batch x (m x k)(k x n)", *_TITLES), rows)


def cost_markdown(cost: Cost) -> str:
    """All tables of one model's cost, the assumptions and the lower bound of the time."""
    network, seconds = cost.network, cost.seconds_at_least
    duration = f"{seconds:,.1f} s" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
    bound = (
        f"At least {duration} for network traffic alone on {network.name} ({network.bandwidth_mbps:g} Mbps each way, "
        f"{network.delay_ms:g} ms one way); computing is extra."
    )
    tables = [to_markdown(make(cost)) for make in (operation_cost_table, layer_cost_table, matmul_cost_table)]
    return "\n".join([*tables, cost.assumptions, "", bound]) + "\n"


def trade_off_table(groups: Sequence[Group]) -> Table:
    """Perplexity and cost of each variant, and whether it is on the Pareto front."""
    points, unpriced = trade_off(groups)
    rows = []
    for point in points:
        perplexity = f"{point.perplexity:.2f}" if math.isfinite(point.perplexity) else "NaN"
        numbers = (perplexity, f"{point.seeds}", gigabytes(point.bytes), f"{point.rounds}")
        rows.append((point.name, *numbers, "yes" if point.on_front else "no"))
    notes = [
        "Perplexity: mean over the n seeds that all variants on this corpus share, or over its own if they share none.",
        "Pareto front: no other variant on the same corpus is at least as low in both perplexity and bytes, and lower "
        "in one.",
        "GELU is priced as the model computes it; its tanh form is cheaper than its erf form "
        "(docs/private-inference.md).",
        *(f"{name} is left out: an operation of it has no price." for name in unpriced),
    ]
    titles = ("Variant", "Perplexity", "n", "GB", "Rounds", "Pareto front")
    caption = "Perplexity against communication in private inference (cheetah)"
    return Table("perplexity-communication", caption, titles, rows, notes, words=("Pareto front",))


def gigabytes(transferred: float) -> str:
    """Three significant digits of GB or more."""
    value = transferred / 1e9
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _model(cost: Cost) -> str:
    return f"{cost.architecture.family}, T={cost.context}, {cost.protocol.name}"


def _grouped_rows(cost: Cost, items: Iterable[Item], key: Callable[[Item], tuple[Any, ...]]) -> list[tuple[str, ...]]:
    groups: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [(*names, *_cells(cost, group)) for names, group in groups.items()]


def _cells(cost: Cost, items: Iterable[Item]) -> tuple[str, ...]:
    items = list(items)
    transferred = sum(item.bytes for item in items)
    elements, rounds = sum(item.count.elements for item in items), sum(item.rounds for item in items)
    share = f"{100 * transferred / cost.bytes:.1f}"
    return f"{len(items)}", f"{elements:,}", gigabytes(transferred), share, f"{rounds}"
