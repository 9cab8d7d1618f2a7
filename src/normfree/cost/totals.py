"""The cost of a model in private inference, bytes and rounds, operation by operation; and perplexity against it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.analysis.groups import Group, scores_on_common_seeds
from normfree.cost.constants import CONSTANTS_FILE, Network, Protocol, find_network, find_protocol
from normfree.cost.counts import Count, count
from normfree.cost.families import Architecture, NoPriceError, read_architecture
from normfree.store.runs import Run


@dataclass(frozen=True)
class Item:
    """One call of an operation with its price."""

    count: Count
    bytes: float  # over both directions
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one forward pass over one sequence."""

    name: str  # the model, as titles show it
    note: str  # an assumption about this model; empty if there is none
    architecture: Architecture
    context: int
    protocol: Protocol
    network: Network
    items: tuple[Item, ...]

    @property
    def bytes(self) -> float:
        """Over both directions."""
        return math.fsum(item.bytes for item in self.items)  # the same for the same items in any order

    @property
    def rounds(self) -> int:
        """Messages that wait for each other if operations run one after another."""
        return sum(item.rounds for item in self.items)

    @property
    def seconds_at_least(self) -> float:
        """Lower bound of the time for traffic: half of the bytes, in the busier direction, and a delay per round."""
        return self.bytes / 2 * 8 / (self.network.bandwidth_mbps * 1e6) + self.rounds * self.network.delay_ms / 1e3

    @property
    def assumptions(self) -> str:
        """The assumptions behind the numbers, in one line."""
        return (
            f"One sequence of {self.context} tokens, one full forward pass, two honest-but-curious parties, all "
            f"weights secret; {self.protocol.about}; rounds: {self.protocol.rounds_origin}; bytes of both directions; "
            "the offline phase and the set-up are not counted." + (self.note and f" {self.note}")
        )


def of_config(
    config: Any,
    *,
    name: str = "",
    note: str = "",
    context: int = 128,
    protocol: str = "cheetah",
    network: str = "wan",
    bandwidth_mbps: float | None = None,
    delay_ms: float | None = None,
    constants: Path | str = CONSTANTS_FILE,
) -> Cost:
    """The cost of a model from its transformers config object, or from the content of a config.json.

    `name` stands in titles (default: the family), `note` among the assumptions. Raises ValueError for an unknown
    family, protocol or network, and NoPriceError (a ValueError) for an activation or norm without a price.
    """
    prices = find_protocol(protocol, constants)
    link = find_network(network, constants, bandwidth_mbps=bandwidth_mbps, delay_ms=delay_ms)
    architecture = read_architecture(config)
    items = tuple(Item(item, *prices.price(item)) for item in count(architecture, context))
    facts = {"name": name or architecture.family, "note": note, "context": context}
    return Cost(**facts, architecture=architecture, protocol=prices, network=link, items=items)


def of_run(run: Run) -> Cost:
    """The cost of a run's model on its own context and vocabulary, from run.json alone."""
    return of_config(config_of_run(run), context=run.spec["data"]["context"])


def config_of_run(run: Run) -> dict[str, Any]:
    """The content of the config.json of a run's saved model, from run.json. Raises ValueError for a measurement."""
    if run.kind == "measurement":
        raise ValueError(f"{run.folder} holds a measurement of {run.label}, not the model: give that model itself")
    facts = {"vocab_size": run.facts["corpus"]["vocab_size"], "max_position_embeddings": run.spec["data"]["context"]}
    return {"model_type": "normfree", **facts, **run.spec["model"], **(run.facts.get("folded") or {}).get("model", {})}


@dataclass(frozen=True)
class Point:
    """Perplexity and cost of one group of runs."""

    name: str
    corpus: str  # fingerprint of its text
    perplexity: float  # mean over the seeds that all groups on its corpus have, else its own; NaN if a run has none
    seeds: int
    bytes: float
    rounds: int
    on_front: bool


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """True where no other point is as low in both values and lower in one. NaN is never on the front."""
    return [
        not any(map(math.isnan, p)) and not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points)
        for p in points
    ]


def trade_off(groups: Iterable[Group]) -> tuple[list[Point], list[str]]:
    """One point per group with a perplexity and a price, cheapest first, and the names of groups without a price."""
    priced, unpriced = [], []
    for group in groups:
        if not group.runs or group.score.name != "perplexity":  # a classifier has an accuracy
            continue
        try:
            priced.append((group, of_run(group.runs[0])))
        except NoPriceError:
            unpriced.append(group.name)
    points = []  # with a front for each corpus, as perplexities on different text cannot be compared
    for corpus in dict.fromkeys(group.runs[0].corpus for group, _ in priced):
        rivals = [(group, cost) for group, cost in priced if group.runs[0].corpus == corpus]
        cells = scores_on_common_seeds([group for group, _ in rivals])
        front = pareto_front([(cells[group.name].mean, cost.bytes) for group, cost in rivals])
        points += [
            Point(group.name, corpus, cells[group.name].mean, cells[group.name].n, cost.bytes, cost.rounds, on_front)
            for (group, cost), on_front in zip(rivals, front, strict=True)
        ]
    return sorted(points, key=lambda point: (point.bytes, point.name)), unpriced
