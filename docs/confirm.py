"""The main variants at rates of their own, on fresh seeds: the comparisons that docs/study.md plans."""

# P seeds

import math
from collections.abc import Callable, Hashable, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import numpy as np

from normfree.analysis.entropy import shares_by_depth, trained_heads
from normfree.analysis.groups import Group
from normfree.analysis.seeds import finite_together, student_t
from normfree.store.runs import Run

MARGIN = math.log(1.05)
"""Below this difference in ln perplexity two variants count as equivalent."""
LABELS = ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")
SEEDS = 8
"""Of each variant; nothing is judged before all of them finished or diverged."""


@dataclass(frozen=True)
class Comparison:
    """The difference of two variants, ours less theirs; NaN where it is open."""

    name: str
    paired: bool
    """By seed; else Welch's."""
    n: int
    """Seeds that finished on both sides."""
    dropped: int
    """Seeds that diverged on a side; with more than one the comparison is open."""
    mean: float = math.nan
    standard_error: float = math.nan
    degrees: float = math.nan
    holm: float = math.nan
    """The p-value with Holm's correction."""
    differences_P: np.ndarray = field(default_factory=lambda: np.empty(0))
    correlation: float = math.nan
    """Of the pairs."""

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's interval around the mean."""
        reach = student_t(self.degrees, confidence) * self.standard_error
        return self.mean - reach, self.mean + reach

    @property
    def p(self) -> float:
        """Two-sided p-value of no difference."""
        from scipy.special import stdtr

        if self.standard_error == 0:
            return float(self.mean == 0)
        return float(2 * stdtr(self.degrees, -abs(self.mean) / self.standard_error))

    @property
    def sign_p(self) -> float:
        """Two-sided exact p-value: the share of all choices of signs whose mean is at least as far from 0.

        NaN for an open comparison, and for one that is not paired.
        """
        signs = np.array(list(product((1, -1), repeat=len(self.differences_P))))
        sums = np.abs(signs @ self.differences_P)
        return float(np.mean(sums >= sums[0] - 1e-12)) if self.paired and len(self.differences_P) else math.nan


def check_all_ended(name: str, runs: Sized, seeds: int) -> None:
    """Raise ValueError unless a study has a result for each of its seeds."""
    if len(runs) != seeds:
        raise ValueError(f"{len(runs)} of {seeds} runs of {name} have a result: nothing is judged before all have")


def compare(
    name: str, groups: Sequence[Group], labels: tuple[str, str], value: Callable[[Run], float], *, paired: bool
) -> Comparison:
    """Compare a number of the runs of two variants. Raises ValueError if a variant is missing."""
    ours, theirs = (_by_seed(groups, label, value) for label in labels)
    (ours_P, theirs_P), diverged = finite_together(ours, theirs)
    comparison = Comparison(name, paired, n=len(ours_P), dropped=diverged)
    if diverged > 1 or comparison.n < 2:
        return comparison
    difference_P = ours_P - theirs_P
    samples = [difference_P] if paired else [ours_P, theirs_P]
    variances = np.array([sample.var(ddof=1) / comparison.n for sample in samples])
    degrees = comparison.n - 1.0
    if variances.any():  # Welch and Satterthwaite; for pairs the same number
        degrees *= variances.sum() ** 2 / np.square(variances).sum()
    return replace(
        comparison,
        mean=difference_P.mean(),
        standard_error=math.sqrt(variances.sum()),
        degrees=degrees,
        differences_P=difference_P,
        correlation=np.corrcoef(ours_P, theirs_P)[0, 1] if ours_P.std() * theirs_P.std() else math.nan,
    )


def primary(groups: Sequence[Group]) -> tuple[Comparison, str]:
    """Cost of leaving LayerNorm out with GELU, in ln perplexity, and the verdict.

    Raises ValueError before all runs of the study have a result.
    """
    for label in LABELS:
        check_all_ended(label, _by_seed(groups, label, log_score), SEEDS)
    cost = compare("SM+G less SM+LN+G, ln perplexity", groups, ("SM+G", "SM+LN+G"), log_score, paired=False)
    (low, high), (lowest, highest) = cost.interval(), cost.interval(0.9)
    if low > MARGIN or high < -MARGIN:
        return cost, "the cost is reproduced (above 5 %)" if low > MARGIN else "a gain above 5 %"
    diverged = any(math.isnan(value) for value in _by_seed(groups, "SM+G", log_score).values())
    return cost, "equivalent within 5 %" if lowest > -MARGIN and highest < MARGIN and not diverged else "open"


def secondary(groups: Sequence[Group]) -> list[Comparison]:
    """Five comparisons, with p-values after Holm (1979)."""
    near_uniform = "SM+G less SM+R, share near uniform, {} third"
    comparisons = [compare("SM+R less SM+G, ln perplexity", groups, ("SM+R", "SM+G"), log_score, paired=True)]
    for third, name in enumerate(("first", "middle", "last")):
        share = partial(_share_of_third, third)
        comparisons.append(compare(near_uniform.format(name), groups, ("SM+G", "SM+R"), share, paired=True))
    labels = ("SM+LN+R", "SM+LN+G")
    comparisons.append(compare("SM+LN+R less SM+LN+G, ln perplexity", groups, labels, log_score, paired=False))
    # An open comparison counts as one with p = 1, and has no corrected p-value itself.
    p_values, highest = [1.0 if math.isnan(each.p) else each.p for each in comparisons], 0.0
    for rank, place in enumerate(np.argsort(p_values)):
        highest = max(highest, min(1.0, (len(comparisons) - rank) * p_values[place]))
        if not math.isnan(comparisons[place].p):
            comparisons[place] = replace(comparisons[place], holm=highest)
    return comparisons


def _by_seed(groups: Sequence[Group], label: str, value: Callable[[Run], float]) -> dict[Hashable, float]:
    runs = [run for group in groups for run in group.runs if run.label == label]
    if not runs:
        raise ValueError(f"no run of {label} among these has a result; give the folders of all main variants")
    return {run.seed: value(run) for run in runs}


def log_score(run: Run) -> float:
    return math.log(run.score)


def _share_of_third(third: int, run: Run) -> float:
    share = shares_by_depth(trained_heads(run))[third]
    return math.nan if share is None else share
