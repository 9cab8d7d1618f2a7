"""Numbers over seeds: mean, sample standard deviation, paired differences with a Student-t interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

# Two-sided 95 % critical values of Student's t for 1..30 degrees of freedom:
# NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2, column 0.975.
_T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Summary:
    """One cell of a table: a number over n seeds."""

    mean: float
    """NaN as soon as one seed is not finite: there is no mean of survivors."""
    standard_deviation: float
    """Of the sample (n - 1); NaN for fewer than two seeds."""
    n: int
    nonfinite: int

    def text(self, digits: int = 2) -> str:
        """`36.1 +- 0.4`, `36.1` for one seed, `NaN (2/3)` when 2 of 3 seeds are not finite, `-` for none."""
        if self.n == 0:
            return "-"
        if self.nonfinite:
            return f"NaN ({self.nonfinite}/{self.n})"
        spread = "" if self.n < 2 else f" +- {decimals(self.standard_deviation, digits)}"
        return f"{decimals(self.mean, digits)}{spread}"


def decimals(value: float, digits: int = 2) -> str:
    """`36.12`, or `1.1e+77` from a million on, where decimals say nothing."""
    return f"{value:.1e}" if 1e6 <= abs(value) < math.inf else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and the interval that holds the true one in 95 of 100 studies."""

    mean: float
    standard_deviation: float
    n: int
    low: float
    """Lower end of the 95 % interval; NaN for fewer than two pairs."""
    high: float
    nonfinite: int
    """Pairs in which a member is not finite; one of them is enough to make the mean NaN."""


def summarise(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of one number a seed."""
    nonfinite = sum(not math.isfinite(value) for value in values)
    usable = [] if nonfinite else list(values)
    return Summary(
        mean=statistics.fmean(usable) if usable else math.nan,
        standard_deviation=statistics.stdev(usable) if len(usable) > 1 else math.nan,
        n=len(values),
        nonfinite=nonfinite,
    )


def student_t_95(degrees: int) -> float:
    """Two-sided 95 % critical value; above 30 degrees of freedom that of 30, at most 4 % too wide."""
    if degrees < 1:
        raise ValueError(f"degrees={degrees}: an interval needs at least 2 pairs, so 1 degree of freedom")
    return _T_95[min(degrees, len(_T_95)) - 1]


def paired_difference(
    ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float], *, relative: bool = False
) -> Difference:
    """`ours - theirs` over the keys (seeds) that both have, as a share of `theirs` when `relative`."""
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
    summary = summarise([(a - b) / b if relative else a - b for a, b in pairs])
    reach = math.nan
    if summary.n > 1:
        reach = student_t_95(summary.n - 1) * summary.standard_deviation / math.sqrt(summary.n)
    return Difference(
        mean=summary.mean,
        standard_deviation=summary.standard_deviation,
        n=summary.n,
        low=summary.mean - reach,
        high=summary.mean + reach,
        nonfinite=summary.nonfinite,
    )
