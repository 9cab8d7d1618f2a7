"""Numbers over seeds: mean, sample standard deviation, paired differences with a Student-t interval."""

import math
import re
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Mean and spread of a number over n seeds."""

    mean: float  # NaN as soon as one seed is not finite, so that it is never a mean of the survivors
    standard_deviation: float  # of the sample (n - 1); NaN for fewer than two seeds
    n: int
    nonfinite: int

    def text(self, digits: int = 2) -> str:
        """`36.1 +- 0.4`, `36.1` for one seed, `NaN (2/3)` if 2 of 3 seeds are not finite, `-` for none."""
        if self.n == 0:
            return "-"
        if self.nonfinite:
            return f"NaN ({self.nonfinite}/{self.n})"
        spread = "" if self.n < 2 else f" +- {decimals(self.standard_deviation, digits)}"
        return f"{decimals(self.mean, digits)}{spread}"


@dataclass(frozen=True)
class Difference(Summary):
    """Summary of paired differences with a 95 % confidence interval; its ends are NaN for fewer than two pairs."""

    low: float
    high: float


def decimals(value: float, digits: int = 2) -> str:
    """`36.12`, or `1.1e+77` from a million on."""
    return f"{value:.1e}" if 1e6 <= abs(value) < math.inf else f"{value:.{digits}f}"


def compact(value: Any) -> str:
    """`1.4e-3`, or `0.05` from 0.01 on; whatever is no such number as it is."""
    is_small = isinstance(value, float) and 0 < abs(value) < 0.01
    return re.sub(r"\.?0*e-0?", "e-", f"{value:e}") if is_small else f"{value}"


def summarise(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of one number per seed."""
    nonfinite = sum(not math.isfinite(value) for value in values)
    usable = [] if nonfinite else list(values)
    mean = statistics.fmean(usable) if usable else math.nan
    return Summary(mean, statistics.stdev(usable) if len(usable) > 1 else math.nan, len(values), nonfinite)


def student_t(degrees: float, confidence: float = 0.95) -> float:
    """Two-sided critical value of Student's t."""
    from scipy.special import stdtrit  # takes a second to load, and costs of models need none of it

    return float(stdtrit(degrees, (1 + confidence) / 2))


def finite_together(*arms: Mapping[Hashable, float]) -> tuple[np.ndarray, int]:
    """(arms, seeds) values over the common seeds that are finite in every arm, and how many of the common are not."""
    common = [seed for seed in arms[0] if all(seed in arm for arm in arms)]
    values_AP = np.array([[arm[seed] for seed in common] for arm in arms], dtype=float)
    is_finite_P = np.isfinite(values_AP).all(axis=0)
    return values_AP[:, is_finite_P], int((~is_finite_P).sum())


def paired_difference(
    ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float], *, relative: bool = False
) -> Difference:
    """`ours - theirs` over the keys (seeds) that both have, as a share of `theirs` if `relative`."""
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
    summary = summarise([(a - b) / b if relative else a - b for a, b in pairs])
    reach = math.nan
    if summary.n > 1:
        reach = student_t(summary.n - 1) * summary.standard_deviation / math.sqrt(summary.n)
    return Difference(**vars(summary), low=summary.mean - reach, high=summary.mean + reach)
