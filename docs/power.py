"""Power of the rules about the cost of removing LayerNorm and about the cause of the gap (docs/study.md).

`python -m docs.power`

ln perplexities of eight seeds, normal and independent: the spread of each variant is that of its recorded seeds in
`cpu-lr1e-3`, where the order of the data did not vary, and half as much again. Of the cause: the share of each verdict
if a row were the truth; arms with GELU take the spread of SM+G, and the gap is that of seed 0 in `cpu-rate-screen` at
2.8e-3. Targets count as reached.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from scipy.stats import ttest_ind

from docs.cause import ARMS, judge_scores
from docs.confirm import MARGIN, SEEDS
from normfree.analysis.groups import Group, group_runs
from normfree.store.runs import find_runs

DRAWS = 2000
COSTS = (0.057, 0.088)
"""In ln perplexity: the mean of the two seeds of the screen, and one that is found in four of five draws."""
SPREADS = (1.0, 1.5)
VERDICTS = ("confirmed", "refuted", "one-way", "partial", "open")


def main() -> None:
    """Print the verdicts on the cost, then a row for each truth: how much of the gap entropy moves down and up."""
    recorded = {group.label: np.std(_logs(group), ddof=1) for group in _groups("results/cpu-lr1e-3")}
    screen = _groups("results/cpu-rate-screen")
    at_rate = {group.label: _logs(group)[0] for group in screen if "lr2.8e-3" in group.name}
    for factor in SPREADS:
        spread = {label: factor * deviation for label, deviation in recorded.items()}
        for cost in COSTS:
            _print_power_of_cost(cost, spread["SM+G"], spread["SM+LN+G"])
        _print_power_of_cause(at_rate["SM+G"] - at_rate["SM+R"], spread)


def _print_power_of_cause(gap: float, spread: Mapping[str, float]) -> None:
    print(f"gap {gap:.3f}; standard deviations SM+G {spread['SM+G']:.3f}, SM+R {spread['SM+R']:.3f}; {SEEDS} seeds")
    print("| down | up | " + " | ".join(VERDICTS) + " |")
    for down, up in ((0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0), (1.0, 0.0)):
        means = {"G": gap, "R": 0.0, "sham G": gap, "sham R": 0.0, "placebo": gap}
        means |= {"G>R": (1 - down) * gap, "R>G": up * gap}
        random, verdicts = np.random.default_rng(0), Counter[str]()
        for _ in range(DRAWS):
            arms = {
                name: dict(enumerate(random.normal(means[name], spread[label], SEEDS)))
                for name, (label, _) in ARMS.items()
            }
            verdicts[judge_scores(arms).verdict] += 1
        print(f"| {down} | {up} | " + " | ".join(f"{verdicts[name] / DRAWS:.0%}" for name in VERDICTS) + " |")


def _print_power_of_cost(cost: float, spread: float, spread_of_baseline: float) -> None:
    random, shape = np.random.default_rng(0), (10 * DRAWS, SEEDS)
    ours, baseline = random.normal(cost, spread, shape), random.normal(0, spread_of_baseline, shape)
    welch = ttest_ind(ours, baseline, axis=1, equal_var=False)
    low, (lowest, highest) = welch.confidence_interval(0.95).low, welch.confidence_interval(0.9)
    reproduced, equivalent = low > MARGIN, (lowest > -MARGIN) & (highest < MARGIN)
    shares = {"reproduced": reproduced, "equivalent": equivalent, "open": ~(reproduced | equivalent)}
    print(f"cost {cost}; standard deviations SM+G {spread:.3f}, SM+LN+G {spread_of_baseline:.3f}; {SEEDS} seeds")
    print(", ".join(f"{name} {share.mean():.0%}" for name, share in shares.items()))


def _groups(folder: str) -> list[Group]:
    return group_runs(find_runs([folder]), mix=True)


def _logs(group: Group) -> list[float]:
    return [math.log(score) for score in group.scores.values()]


if __name__ == "__main__":
    main()
