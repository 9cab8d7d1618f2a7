"""Recorded values of a run; head entropies, their ceiling and their ranges.  L layers, H heads, R ranges"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normfree.analysis.groups import Group, all_runs
from normfree.spec.families import FAMILIES
from normfree.store.quantities import Quantity
from normfree.store.runs import Run

Floats = NDArray[np.float64]

OVERLOAD_SHARE = 0.75  # a head at or above this share of the causal ceiling is nearly uniform
RANGES = ("[0, 1/4)", "[1/4, 1/2)", "[1/2, 3/4)", "[3/4, 1]")
NORMALISERS = {
    "observed": "the highest entropy measured here (the paper's Max)",
    "log_t": "ln T, which only the last row of a causal matrix can reach",
    "causal": "ln(T!)/T, the entropy if every token looked equally at all tokens up to itself",
    "ceiling": "in models that are not causal, the entropy if every row looked equally at all that it sees",
}
"""`log_t` and `causal` are of causal models, `ceiling` of the others."""


@dataclass(frozen=True)
class Heads:
    """The entropies of every head of one run at one step."""

    entropy_LH: Floats  # nats; NaN for a head with non-finite rows
    ceiling_L: Floats  # entropy in nats of a head that attends uniformly to every visible token
    step: int
    layers: Sequence[int | str]  # the model's own numbers, or `encoder 0`, `cross 0` with several groups of heads
    exists_LH: NDArray[np.bool_] | None = None  # False where a layer has fewer heads than the widest one

    @property
    def existing(self) -> NDArray[np.bool_]:
        """[L, H]: `exists_LH`, True for all heads where that is None."""
        return np.ones(self.entropy_LH.shape, dtype=bool) if self.exists_LH is None else self.exists_LH

    @property
    def groups(self) -> list[Self]:
        """The heads of each group; one for a model with a single stack of layers."""
        places: dict[str, list[int]] = {}
        for place, layer in enumerate(self.layers):
            places.setdefault(group_and_number(layer)[0], []).append(place)
        return [self.part(rows) for rows in places.values()]

    def part(self, rows: Sequence[int] | NDArray[np.int_]) -> Self:
        """The heads of some layers, by their places."""
        values = {"entropy_LH": self.entropy_LH[rows], "ceiling_L": self.ceiling_L[rows]}
        return replace(self, **values, layers=[self.layers[row] for row in rows], exists_LH=self.existing[rows])


@dataclass(frozen=True)
class RangeCounts:
    """Heads in each quarter of a maximum; those without a finite entropy are in none."""

    finite_R: tuple[int, ...]
    nonfinite: int
    maximum_nats: float  # the entropy that counts as 1, averaged over layers

    @property
    def heads(self) -> int:
        return sum(self.finite_R) + self.nonfinite

    @property
    def shares(self) -> list[float]:
        """Shares of all heads; they sum to 1 only if every head is finite."""
        return [count / self.heads for count in self.finite_R]


def group_and_number(layer: int | str) -> tuple[str, int]:
    """`encoder 3` as (encoder, 3); the group of a plain number is empty."""
    group, _, number = str(layer).rpartition(" ")
    return group, int(number)


def ceiling_words(runs: Iterable[Run]) -> str:
    """The name of the ceiling of these runs: causal, unless a measured model has rows that see later tokens."""
    return "causal ceiling" if all(map(_is_causal, runs)) else "ceiling"


def _is_causal(run: Run) -> bool:
    return run.facts.get("measurement", {}).get("causal", run.family.causal) is True


def causal_ceiling(context: int) -> float:
    """Entropy of a uniform causal head: the mean of ln i for i = 1..T, which is ln(T!)/T."""
    return FAMILIES["decoder"].ceiling(context)


def layer_means(values: ArrayLike) -> Floats:
    """One number per layer: the mean over its heads if it has heads, NaN if one of them is not finite."""
    values = np.atleast_1d(np.asarray(values, dtype=float))
    return values.mean(axis=1) if values.ndim == 2 else values


def shares_of_ceiling(heads: Heads) -> Floats:
    """Entropy of every head as a share of its layer's causal ceiling, [L, H]."""
    return heads.entropy_LH / heads.ceiling_L[:, None]


def top_quarter_share(heads: Heads | None, line: float = OVERLOAD_SHARE) -> float:
    """Share of heads at or above a share (`line`) of the ceiling; NaN if one is not finite or none was measured."""
    if heads is None or not np.isfinite(heads.entropy_LH[heads.existing]).all():
        return math.nan
    return float((shares_of_ceiling(heads)[heads.existing] >= line).mean())


def shares_by_depth(heads: Heads | None, line: float = OVERLOAD_SHARE) -> list[float | None]:
    """`top_quarter_share` of the early, middle and late third of the layers, None if empty, then of all."""
    if heads is None:
        return [math.nan] * 4
    layers = np.arange(len(heads.entropy_LH))  # several groups of heads have no common depth, so no thirds
    parts = (*np.array_split(layers if len(heads.groups) == 1 else layers[:0], 3), layers)
    return [top_quarter_share(heads.part(part), line) if len(part) else None for part in parts]


def values_over_training(run: Run, name: str) -> list[tuple[int, Floats]]:
    """(step, values) of any quantity, oldest first: from probes, else from validation, else from the training log."""
    for split in ("probe", "validation", "train"):
        if series := run.series(split, name):
            return [(step, np.array(value, dtype=float)) for step, value in series]
    return []


def newest_values(run: Run, name: str) -> Floats | None:
    """The values of a quantity after training, else the newest before that; None if it was never measured."""
    final = run.last("final", name)
    if final is not None:
        return np.array(final, dtype=float)
    series = values_over_training(run, name)
    return series[-1][1] if series else None


def recorded_quantities(groups: Sequence[Group], *, drawn: str) -> list[Quantity]:
    """Quantities that runs of these groups recorded and the report draws in this place (`open` or `folded`)."""
    runs = all_runs(groups)
    by_name = {q.name: q for run in runs for q in run.quantities.values() if q.drawn == drawn}
    return [q for q in by_name.values() if any(newest_values(run, q.name) is not None for run in runs)]


def probed_heads(run: Run, split: str = "probe") -> list[Heads]:
    """The entropies of every probe of a run, oldest first; `final` is the large sample after training."""
    ceilings, uniform_nats = dict(run.series(split, "ceiling_nats")), causal_ceiling if _is_causal(run) else math.log
    rows, nonfinite = (
        dict(run.series(split, name) if run.kind == "measurement" else ()) for name in ("rows", "nonfinite_rows")
    )
    heads = []
    for step, value in run.series(split, "entropy_nats"):
        ceiling_L = np.array(ceilings[step], dtype=float)
        ceiling_L[np.isnan(ceiling_L)] = uniform_nats(run.spec["data"]["context"])  # no finite row in this layer
        layers = run.layer_numbers("entropy_nats", len(value))
        exists_LH = None if step not in rows else np.array(rows[step]) + np.array(nonfinite[step]) > 0
        heads.append(Heads(np.array(value, dtype=float), ceiling_L, step, layers, exists_LH))
    return heads


def final_heads(run: Run) -> Heads | None:
    """The entropies after training, else those of the newest probe, else None."""
    return next(reversed(probed_heads(run, "final") or probed_heads(run)), None)


def trained_heads(run: Run) -> Heads | None:
    """The entropies after training; None for a run that did not finish or was not measured then."""
    return next(reversed(probed_heads(run, "final")), None) if run.status == "finished" else None


def range_counts(entropy_LH: ArrayLike, maximum: ArrayLike) -> RangeCounts:
    """Count heads per quarter of `maximum` in nats (one number, or one per layer).

    A quarter contains its lower edge. The last one also contains its upper edge and values that rounding puts above it.
    A head of 0 nats is in the first one, even if the maximum is 0.
    """
    entropy_LH = np.asarray(entropy_LH, dtype=float)
    maximum_L1 = np.broadcast_to(np.asarray(maximum, dtype=float), entropy_LH.shape[:1])[:, None]
    finite_LH = np.isfinite(entropy_LH)
    share_LH = np.divide(entropy_LH, maximum_L1, out=np.zeros_like(entropy_LH), where=entropy_LH != 0)
    quarter = np.floor(4 * share_LH[finite_LH]).clip(0, 3).astype(int)
    counts_R = np.bincount(quarter, minlength=4)
    return RangeCounts(tuple(counts_R.tolist()), int((~finite_LH).sum()), float(maximum_L1.mean()))


def pooled_ranges(groups: Sequence[Group]) -> dict[str, dict[str, RangeCounts]]:
    """`{group: {normaliser: counts}}` over the seeds of all groups with a run that was measured after training.

    A diverged run is left out: it was trained for less time, so its heads are closer to uniform.
    Under `observed`, all groups share one maximum.
    """
    heads_of = {group.name: [heads for run in group.runs if (heads := trained_heads(run))] for group in groups}
    entropies = np.concatenate([[], *(heads.entropy_LH.ravel() for each in heads_of.values() for heads in each)])
    observed = max(entropies[np.isfinite(entropies)], default=math.nan)
    pooled = {}
    for group in groups:
        if heads := heads_of[group.name]:
            entropy_LH = np.concatenate([seed.entropy_LH for seed in heads])
            maxima, ceiling_L = {"observed": observed}, np.concatenate([seed.ceiling_L for seed in heads])
            if _is_causal(group.runs[0]):
                maxima |= {"log_t": math.log(group.runs[0].spec["data"]["context"]), "causal": ceiling_L}
            else:
                maxima["ceiling"] = ceiling_L
            counts = {name: range_counts(entropy_LH, maximum) for name, maximum in maxima.items()}
            missing = sum(int((~seed.existing).sum()) for seed in heads)
            pooled[group.name] = {n: replace(count, nonfinite=count.nonfinite - missing) for n, count in counts.items()}
    return pooled
