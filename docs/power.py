"""Power of the rule about the cause (docs/study.md): the share of each verdict, if a row were the truth.

`python -m docs.power`

ln perplexities of eight seeds: the spread of SM+G and SM+R is that of five recorded seeds of `cpu-lr1e-3`, arms with
GELU take that of SM+G, and the gap is that of seed 0 in `cpu-rate-screen` at 2e-3. Seeds share nothing between arms.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from docs.cause import ARMS, judge_scores
from normfree.analysis.groups import Group, group_runs
from normfree.store.runs import find_runs

SEEDS, DRAWS = 8, 2000
VERDICTS = ("confirmed", "refuted", "one-way", "partial", "open")


def main() -> None:
    """Print a row for each truth: how much of the gap entropy moves down and up, and the share of each verdict."""
    spread = {group.label: np.std(_logs(group), ddof=1) for group in _groups("results/cpu-lr1e-3")}
    at_2e3 = {group.label: _logs(group)[0] for group in _groups("results/cpu-rate-screen") if "lr2e-3" in group.name}
    gap = at_2e3["SM+G"] - at_2e3["SM+R"]
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


def _groups(folder: str) -> list[Group]:
    return group_runs(find_runs([folder]), mix=True)


def _logs(group: Group) -> list[float]:
    return [math.log(score) for score in group.scores.values()]


if __name__ == "__main__":
    main()
