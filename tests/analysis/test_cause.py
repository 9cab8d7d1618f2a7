"""The rule of the study of the cause."""

from __future__ import annotations

import math

import numpy as np
import pytest

from normfree.analysis.cause import fieller, judge_scores


def test_fiellers_interval_covers_the_ratio_in_95_percent():
    random, covered = np.random.default_rng(1), 0
    for _ in range(2000):
        common = random.normal(0, 0.02, 8)
        interval = fieller(random.normal(0.03, 0.01, 8) + common, random.normal(0.1, 0.02, 8) + common)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.935 < covered / 2000 < 0.965


def test_fiellers_ends_are_where_the_difference_is_just_significant():
    above, below = np.array([0.02, 0.05, 0.03, 0.06]), np.array([0.1, 0.09, 0.12, 0.11])
    ratio = fieller(above, below)
    assert ratio.value == pytest.approx(0.16 / 0.42)
    for end in (ratio.low, ratio.high):
        rest = above - end * below
        assert abs(rest.mean()) / (rest.std(ddof=1) / 2) == pytest.approx(3.182, abs=1e-3)
    assert math.isinf(fieller(above, np.array([0.1, -0.2, 0.15, 0.0])).high)


def _arms(down: float, up: float, gap: float = 0.1, noise: float = 0.002) -> dict[str, dict[int, float]]:
    means = {"G": gap, "R": 0.0, "sham G": gap, "sham R": 0.0, "G>R": (1 - down) * gap, "R>G": up * gap, "placebo": gap}
    random = np.random.default_rng(0)
    return {name: dict(enumerate(3 + mean + random.normal(0, noise, 8))) for name, mean in means.items()}


@pytest.mark.parametrize(
    ("down", "up", "verdict"),
    [(1, 1, "confirmed"), (0, 0.1, "refuted"), (1, 0, "one-way"), (0.5, 1, "partial"), (0.5, 0.5, "partial")],
)
def test_the_verdict_follows_the_rule(down: float, up: float, verdict: str):
    judged = judge_scores(_arms(down, up))
    assert judged.verdict == verdict
    assert judged.down is not None
    assert judged.down.low < down < judged.down.high
    assert judged.kept is not None
    assert judged.kept.value == pytest.approx(1, abs=0.05)
    assert judged.specific is not None
    assert (judged.specific.high < 0) == (down > 0.2)


def test_a_second_diverged_seed_leaves_it_open():
    arms = _arms(1, 1)
    arms["G>R"][3] = math.nan
    judged = judge_scores(arms)
    assert judged.verdict == "confirmed"
    arms["sham R"][5] = math.nan
    assert judge_scores(arms).down is None
    assert judge_scores(arms).verdict == "open"
    assert judge_scores(_arms(1, 1, gap=0.0)).verdict == "open"
