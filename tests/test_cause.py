"""The rule of the study of the cause."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from docs.cause import ARMS, fieller, judge_scores, reached, runs_by_arm
from docs.study_tables import cause_table, pilot_table
from normfree.analysis.entropy import causal_ceiling
from normfree.analysis.groups import group_runs
from normfree.store.runs import Run, RunWriter, read_run
from tests.synthetic import write_run


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
    assert judged.down.low < down < judged.down.high
    assert judged.kept.value == pytest.approx(1, abs=0.05)
    assert (judged.specific.high < 0) == (down > 0.2)


def test_a_second_diverged_seed_leaves_it_open():
    arms = _arms(1, 1)
    arms["G>R"][3] = math.nan
    judged = judge_scores(arms)
    assert judged.verdict == "confirmed"
    arms["R>G"][5] = math.nan
    assert judge_scores(arms).down is None
    assert judge_scores(arms).verdict == "open"
    assert judge_scores(_arms(1, 1, gap=0.0)).verdict == "open"


def test_a_missed_target_gives_no_verdict():
    assert judge_scores(_arms(0, 0), missed=["G>R"]).verdict == "not achieved"
    placebo = judge_scores(_arms(1, 1), missed=["placebo"])
    assert placebo.verdict == "confirmed"
    assert judge_scores(_arms(1, 1)).is_specific
    assert not placebo.is_specific


TERM: dict[str, Any] = {"objective": "entropy_target", "entropy_weight": 0.1, "entropy_layers": (0, 1)}


def _aimed(
    folder: Path,
    donors: list[Run],
    seed: int,
    errors: dict[int, float],
    arm: tuple[str, str] = ("SM+G", "like-r-weight0.1"),
    perplexity: float = 36.0,
) -> Run:
    """A run of an arm with target entropies: the squared error of its layers 0 and 1 at some steps."""
    profile = tuple(str(donor.folder) for donor in donors)
    train = TERM | {"entropy_profile": profile}
    run = write_run(folder, arm[0], seed=seed, tag=arm[1], train=train, perplexity=perplexity)
    writer = RunWriter(run.folder, run.facts)
    for step, error in errors.items():
        writer.log(step, "probe", [("target_error_nats2", [error, error / 4, math.nan, math.nan])])
    writer.update(status="finished")
    return read_run(run.folder)


def test_a_target_is_hit_within_both_bounds(tmp_path: Path):
    donors = [write_run(tmp_path, "SM+R", seed=seed) for seed in (20, 21)]
    errors = {20: 9.0, 60: 0.0001, 120: 0.0121, 200: 0.0049}  # of 200 steps, so the first does not count
    run = _aimed(tmp_path, donors, 30, errors)
    found = reached(run, donors)
    np.testing.assert_allclose(found.distance_L, [(0.01 + 0.11 + 0.07) / 3, (0.01 + 0.11 + 0.07) / 6])
    entropies = [np.array(each.last("final", "entropy_nats"))[:2] for each in (run, *donors)]
    shares = [(entropy_LH / causal_ceiling(32) >= 0.75).mean() for entropy_LH in entropies]
    assert found.points == pytest.approx(100 * (shares[0] - (shares[1] + shares[2]) / 2))
    assert found.points > 6
    assert not found.is_target_hit
    assert replace(found, points=-6.0).is_target_hit
    assert not replace(found, points=0.0, distance_L=np.array([0.02, 0.11])).is_target_hit
    table = pilot_table(group_runs([run, _aimed(tmp_path, donors, 31, errors)], mix=True))
    assert [row[:2] for row in table.rows] == [("0.1", f"SM+G like-r, seed {seed}") for seed in (30, 31)]
    more = TERM | {"entropy_weight": 0.3, "entropy_profile": run.spec["train"]["entropy_profile"]}
    lost = write_run(tmp_path, "SM+G", seed=32, tag="like-r-weight0.3", status="diverged", train=more)
    assert pilot_table(group_runs([run, lost], mix=True)).rows[1][2:7] == ("diverged", "-", "-", "no", "0 of 1")
    with pytest.raises(ValueError, match="is no finished run with target entropies"):
        reached(donors[0], donors)


def test_the_table_of_the_cause_has_arms_and_verdict(tmp_path: Path):
    values, errors, arms = _arms(1, 1), {100: 0.0025, 200: 0.0025}, {}
    for arm, (label, tag) in ARMS.items():
        donors = arms["G" if label == "SM+G" else "R"] if tag else []  # with as many heads near uniform
        for seed, value in values[arm].items():
            study, score = tmp_path / arm, math.exp(value)
            run = _aimed(study, donors, seed, errors, (label, tag), score) if tag else None
            arms.setdefault(arm, []).append(run or write_run(study, label, seed=seed, perplexity=score))
    runs = [run for of_arm in arms.values() for run in of_arm]
    unfinished = write_run(tmp_path / "unfinished", "SM+R", seed=9, status="interrupted")
    rows = {row[0]: row[1:] for row in cause_table(group_runs([*runs, unfinished], mix=True)).rows}
    judged = judge_scores(values)
    assert rows["Verdict"][0] == judged.verdict == "confirmed"
    assert rows["Layers matter"][0] == "yes"
    assert rows["Share of it that goes with the entropies of SM+R"][0] == f"{judged.down.value:+.3f}"
    assert rows["ln perplexity of placebo"][2] == "hit: 0.050 nats, +0.0 points"
    assert not rows["ln perplexity of R"][2]
    far = [_aimed(tmp_path / "far", arms["R"], seed, {200: 0.04}, ARMS["R>G"], 20.0) for seed in range(8)]
    others = [run for run in runs if run not in arms["R>G"]]
    rows = {row[0]: row[1:] for row in cause_table(group_runs([*others, *far], mix=True)).rows}
    assert rows["ln perplexity of R>G"][2] == "missed: 0.200 nats, +0.0 points"
    assert rows["Verdict"][0] == "not achieved"
    with pytest.raises(ValueError, match=r"7 of 8 runs of the arm placebo \(SM\+G, tag '.*'\) have a result"):
        runs_by_arm(runs[:-1])
