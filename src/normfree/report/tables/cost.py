"""Tables of the cost of private inference: by operation, by layer, by matrix product, and against perplexity."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import chain, groupby
from typing import Any

import pandas as pd

from normfree.analysis.groups import Group
from normfree.analysis.verdicts import WORDS
from normfree.cost.counts import Count, Matmul
from normfree.cost.totals import Cost, Item, trade_off
from normfree.report.tables.table import Table, to_markdown

_TITLES = ("Calls", "Elements", "GB", "% of bytes", "Rounds")


def cost_tables(cost: Cost) -> list[Table]:
    """Tables of a model's cost: by operation and place in the model, by layer, and by shape of the matrix products."""
    model = f"{cost.name}, T={cost.context}, {cost.protocol.name}"
    titles, total = ("Operation", "Where", *_TITLES), _cells(cost, cost.items)
    matmuls = [item for item in cost.items if isinstance(item.count, Matmul)]
    operations = [(*names, *_cells(cost, items)) for names, items in _grouped(cost.items, _operation).items()]
    shapes = _grouped(matmuls, lambda count: f"{count.batch} x ({count.m} x {count.k})({count.k} x {count.n})")
    products = [(shape, *_cells(cost, items)) for shape, items in shapes.items()]
    rows = [*operations, ("all", "", *total)]
    return [
        Table("cost-operations", f"{model}: by operation", titles, rows, words=("Where",)),
        Table("cost-layers", f"{model}: by layer", ("Where", *_TITLES), [*_layer_rows(cost), ("all", *total)]),
        Table("cost-matmuls", f"{model}: matrix products", ("batch x (m x k)(k x n)", *_TITLES), products),
    ]


def cost_record(cost: Cost) -> dict[str, Any]:
    """The cost as plain values: the total, each operation in each part of the model, and each layer."""
    operations, layers = _grouped(cost.items, _operation).items(), _grouped(cost.items, _place).items()
    return {
        "model": cost.name,
        "family": cost.architecture.family,
        "context": cost.context,
        "protocol": cost.protocol.name,
        "network": asdict(cost.network),
        "assumptions": cost.assumptions,
        "total": _sums(cost.items) | {"seconds_at_least": cost.seconds_at_least},
        "operations": [{"operation": name, "where": where, **_sums(items)} for (name, where), items in operations],
        "layers": [{"where": where, **_sums(items)} for where, items in layers],
    }


def cost_csv(cost: Cost) -> str:
    """`cost_record` as CSV: a row for the total, for each operation and for each layer."""
    record = cost_record(cost)
    facts = record | asdict(cost.network) | {"network": cost.network.name}
    scopes = {"total": [record["total"]], "operation": record["operations"], "layer": record["layers"]}
    titles = ["model", "protocol", "network", "bandwidth_mbps", "delay_ms", "context", "scope", "operation", "where"]
    rows = [facts | {"scope": scope} | row for scope, rows in scopes.items() for row in rows]
    return pd.DataFrame(rows, columns=[*titles, *record["total"]]).to_csv(index=False)


def cost_markdown(cost: Cost) -> str:
    """All tables of one model's cost, the assumptions and the lower bound of the time."""
    network, seconds = cost.network, cost.seconds_at_least
    duration = f"{seconds:,.1f} s" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
    bound = (
        f"At least {duration} for network traffic alone on {network.name} ({network.bandwidth_mbps:g} Mbps each way, "
        f"{network.delay_ms:g} ms one way); computing is extra."
    )
    return "\n".join([*map(to_markdown, cost_tables(cost)), cost.assumptions, "", bound]) + "\n"


def trade_off_table(groups: Sequence[Group]) -> Table:
    """Perplexity and cost of each variant, and whether it is on the Pareto front."""
    points, unpriced = trade_off(groups)
    rows = []
    for point in points:
        perplexity = f"{point.perplexity:.2f}" if math.isfinite(point.perplexity) else "NaN"
        numbers = (perplexity, f"{point.seeds}", gigabytes(point.bytes), f"{point.rounds}")
        rows.append((point.name, *numbers, WORDS[point.on_front]))
    notes = [
        "Perplexity: mean over the n seeds that all variants on this corpus share, or over its own if they share none.",
        "Pareto front: no other variant on this corpus is as low in perplexity and bytes, and lower in one of them.",
        "GELU is priced as computed; its tanh form is cheaper than its erf form (docs/private-inference.md).",
        *(f"{name} is left out: an operation of it has no price." for name in unpriced),
    ]
    titles = ("Variant", "Perplexity", "n", "GB", "Rounds", "Pareto front")
    caption = "Perplexity against communication in private inference (cheetah)"
    return Table("perplexity-communication", caption, titles, rows, notes, words=("Pareto front",))


def gigabytes(transferred: float) -> str:
    """Three significant digits of GB or more."""
    value = transferred / 1e9
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _operation(count: Count) -> tuple[str, str]:
    return count.operation, count.part


def _place(count: Count) -> str:
    return count.part if count.layer is None else f"layer {count.layer}"


def _grouped(items: Sequence[Item], key: Callable[[Any], Any]) -> dict[Any, list[Item]]:
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item.count), []).append(item)
    return groups


def _layer_rows(cost: Cost) -> list[tuple[str, ...]]:
    """One row per place in the model; identical layers in a row share one."""
    rows = []
    places = _grouped(cost.items, _place).items()
    for _, alike in groupby(places, lambda place: [replace(item.count, layer=None) for item in place[1]]):
        names, calls = zip(*alike, strict=True)
        name = names[0] if len(names) == 1 else f"layers {names[0].split()[1]}-{names[-1].split()[1]}"
        rows.append((name, *_cells(cost, list(chain.from_iterable(calls)))))
    return rows


def _sums(items: Sequence[Item]) -> dict[str, Any]:
    elements, rounds = sum(item.count.elements for item in items), sum(item.rounds for item in items)
    transferred = math.fsum(item.bytes for item in items)
    return {"calls": len(items), "elements": elements, "bytes": transferred, "rounds": rounds}


def _cells(cost: Cost, items: Sequence[Item]) -> tuple[str, ...]:
    calls, elements, transferred, rounds = _sums(items).values()
    share = f"{100 * transferred / cost.bytes:.1f}"
    return f"{calls}", f"{elements:,}", gigabytes(transferred), share, f"{rounds}"
