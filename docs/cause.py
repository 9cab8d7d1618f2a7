"""The rule of docs/study.md that says whether head entropy causes the gap between GELU and ReLU."""

# P seeds that finished in every arm of a comparison, L layers with a target

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from docs.confirm import SEEDS, check_all_ended
from normfree.analysis.entropy import Heads, top_quarter_share, trained_heads
from normfree.analysis.seeds import Difference, finite_together, paired_difference, student_t
from normfree.store.runs import Run

ARMS = {
    "G": ("SM+G", ""),
    "R": ("SM+R", ""),
    "G>R": ("SM+G", "like-r"),
    "R>G": ("SM+R", "like-g"),
    "sham G": ("SM+G", "like-g"),
    "sham R": ("SM+R", "like-r"),
    "placebo": ("SM+G", "like-r-reversed"),
}
"""Label and tag of each arm: `like-r` has the entropies of SM+R as targets, `reversed` those of other layers."""
DECIDING = ("sham G", "sham R", "G>R", "R>G")
"""The arms of the verdict: a seed that diverged in one of them counts in none."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of means over pairs, with Fieller's 95 % interval: infinite if the mean below may be 0."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cause:
    """The numbers of the rule; None where more than one seed diverged, which leaves a comparison open."""

    missed: tuple[str, ...]
    """Arms that did not reach their targets."""
    gap: Difference | None
    """ln perplexity, sham G less sham R."""
    down: Ratio | None
    """Share of the gap that goes when SM+G has the entropies of SM+R."""
    up: Ratio | None
    """Share of it that comes when SM+R has those of SM+G."""
    kept: Ratio | None
    """The gap of the shams as a share of that of the plain variants."""
    specific: Difference | None
    """(sham G - placebo) - (sham G - G>R) / 2; below 0 if it matters which layers have the targets."""

    @property
    def verdict(self) -> str:
        """`confirmed`, `refuted`, `one-way`, `partial`, `open` or `not achieved`."""
        if self.gap is None or self.down is None or self.up is None:
            return "open"
        if set(self.missed) & set(DECIDING):
            return "not achieved"
        if not self.gap.low > 0:
            return "open"
        above = [share.low > 0.5 for share in (self.down, self.up)]
        below = [share.high < 0.5 for share in (self.down, self.up)]
        if all(above) or all(below):
            return "confirmed" if all(above) else "refuted"
        return "one-way" if any(above) and any(below) else "partial"

    @property
    def is_specific(self) -> bool:
        """True if it matters which layers have the targets, and the placebo reached its own."""
        return self.specific is not None and self.specific.high < 0 and "placebo" not in self.missed


@dataclass(frozen=True)
class Reached:
    """Distance of a run's heads from the entropies of its donors."""

    distance_L: np.ndarray
    """Root mean square of M - t over each layer's heads, in nats: the average over the last three quarters of steps."""
    points: float
    """Heads near uniform in these layers after training, less the donors' mean, in percentage points."""

    @property
    def is_target_hit(self) -> bool:
        """Within 0.1 nats in every layer, and within 6 points."""
        return bool((self.distance_L <= 0.1).all() and abs(self.points) <= 6)


def runs_by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The finished or diverged runs of each arm. Raises ValueError before all runs of every arm have a result."""
    arms: dict[str, list[Run]] = {}
    results = [run for run in runs if run.has_result]
    for arm, names in ARMS.items():
        arms[arm] = [run for run in results if (run.spec["label"], run.spec["tag"]) == names]
        check_all_ended(f"the arm {arm} ({names[0]}, tag {names[1]!r})", arms[arm], SEEDS)
    return arms


def average(of_seeds: Sequence[Reached]) -> Reached:
    """The mean over seeds."""
    distances_L = np.mean([each.distance_L for each in of_seeds], axis=0)
    return Reached(distances_L, fmean(each.points for each in of_seeds))


def reached(run: Run, donors: Sequence[Run]) -> Reached:
    """Compare a finished run with its targets. Raises ValueError for a run without any."""
    series = run.series("probe", "target_error_nats2")
    errors = [value for step, value in series if 4 * step >= run.facts["steps"]]
    if not errors or not (heads := trained_heads(run)):
        raise ValueError(f"{run.folder} is no finished run with target entropies")
    layers = list(run.spec["train"]["entropy_layers"] or range(len(heads.entropy_LH)))
    sources = list(run.spec["train"]["entropy_profile_layers"]) or layers

    def share(heads: Heads | None, places: list[int]) -> float:
        return math.nan if heads is None else 100 * top_quarter_share(heads.part(places))

    distances_L = np.mean([np.sqrt(np.array(value, dtype=float)[layers]) for value in errors], axis=0)
    theirs = fmean(share(trained_heads(donor), sources) for donor in donors)
    return Reached(distances_L, share(heads, layers) - theirs)


def judge_scores(arms: Mapping[str, Mapping[Hashable, float]], missed: Collection[str] = ()) -> Cause:
    """Apply the rule to ln perplexities by arm of `ARMS` and by seed, NaN for a run that diverged.

    `missed` names the arms that did not reach their targets.
    """

    def together(*names: str) -> list[np.ndarray] | None:
        values, diverged = finite_together(*(arms[name] for name in names))
        return None if diverged > 1 or values.shape[1] < 2 else list(values)

    deciding, kept = together(*DECIDING), together("sham G", "sham R", "G", "R")
    specific, gap, down, up = together("sham G", "placebo", "G>R"), None, None, None
    if deciding is not None:
        sham_g, sham_r, lowered, raised = deciding
        gap = _less(sham_g, sham_r)
        down, up = fieller(sham_g - lowered, sham_g - sham_r), fieller(raised - sham_r, sham_g - sham_r)
    return Cause(
        missed=tuple(missed),
        gap=gap,
        down=down,
        up=up,
        kept=None if kept is None else fieller(kept[0] - kept[1], kept[2] - kept[3]),
        specific=None if specific is None else _less((specific[0] + specific[2]) / 2, specific[1]),
    )


def fieller(above_P: np.ndarray, below_P: np.ndarray) -> Ratio:
    """mean(above) / mean(below) over pairs, with Fieller's 95 % interval.

    It holds every ratio f for which mean(above - f below) is not significantly different from 0 (E. C. Fieller, J. R.
    Stat. Soc. B 16, 175, 1954).
    """
    squared_t = student_t(len(above_P) - 1) ** 2 / len(above_P)
    (variance_above, covariance), (_, variance_below) = np.cov(above_P, below_P)
    above, below = above_P.mean(), below_P.mean()
    a = below**2 - squared_t * variance_below
    b = above * below - squared_t * covariance
    c = above**2 - squared_t * variance_above
    if a <= 0:
        return Ratio(above / below, -math.inf, math.inf)
    reach = math.sqrt(max(0.0, b * b - a * c))
    return Ratio(above / below, (b - reach) / a, (b + reach) / a)


def _less(ours_P: np.ndarray, theirs_P: np.ndarray) -> Difference:
    return paired_difference(dict(enumerate(ours_P)), dict(enumerate(theirs_P)))
