"""The primary and secondary comparisons, beside scipy's tests."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from docs.confirm import LABELS, MARGIN, compare, primary, secondary
from docs.study_tables import confirm_table
from normfree.analysis.groups import Group, group_runs
from tests.synthetic import write_run

SPREAD = {"SM+LN+G": 0.004, "SM+LN+R": 0.005, "SM+G": 0.03, "SM+R": 0.009}


def _groups(folder: Path, means: dict[str, float], diverged: tuple[tuple[str, int], ...] = ()) -> list[Group]:
    random = np.random.default_rng(1)
    runs = []
    for label in LABELS:
        for seed in range(10, 18):
            status = "diverged" if (label, seed) in diverged else "finished"
            perplexity = math.exp(3 + means.get(label, 0) + random.normal(0, SPREAD[label]))
            runs.append(write_run(folder, label, seed=seed, data_seed=seed, status=status, perplexity=perplexity))
    return group_runs(runs)


def _logs(groups: list[Group], label: str) -> np.ndarray:
    [group] = [group for group in groups if group.label == label]
    return np.log(list(group.scores.values()))


def test_welch_and_paired_tests_are_those_of_scipy(tmp_path: Path) -> None:
    groups = _groups(tmp_path, {"SM+G": 0.1, "SM+R": 0.05})
    cost, verdict = primary(groups)
    welch = stats.ttest_ind(_logs(groups, "SM+G"), _logs(groups, "SM+LN+G"), equal_var=False)
    np.testing.assert_allclose([cost.p, cost.degrees], [welch.pvalue, welch.df])
    np.testing.assert_allclose(cost.interval(0.9), welch.confidence_interval(0.9))
    assert verdict == "the cost is reproduced (above 5 %)"
    paired = stats.ttest_rel(_logs(groups, "SM+R"), _logs(groups, "SM+G"))
    relu = secondary(groups)[0]
    np.testing.assert_allclose([relu.p, *relu.interval()], [paired.pvalue, *paired.confidence_interval()])
    rows = confirm_table(groups).rows
    assert [row[-1] for row in rows[:3]] == [verdict, "beside", "differs"]
    assert len(rows) == 7
    signs = stats.permutation_test((relu.differences_P,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert relu.sign_p == pytest.approx(signs.pvalue)
    assert relu.correlation == pytest.approx(stats.pearsonr(_logs(groups, "SM+R"), _logs(groups, "SM+G")).statistic)


def test_holm_is_the_step_down_of_the_sorted_values(tmp_path: Path) -> None:
    found = secondary(_groups(tmp_path, {"SM+R": -0.02}))
    p = [each.p for each in found]
    order = np.argsort(p)
    stepped = np.maximum.accumulate(np.minimum(1, (5 - np.arange(5)) * np.array(p)[order]))
    np.testing.assert_allclose([found[place].holm for place in order], stepped)


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [
        (0.0, "equivalent within 5 %"),
        (MARGIN, "open"),
        (0.2, "the cost is reproduced (above 5 %)"),
        (-0.2, "a gain above 5 %"),
    ],
)
def test_the_primary_verdict_follows_its_margins(tmp_path: Path, mean: float, verdict: str) -> None:
    assert primary(_groups(tmp_path, {"SM+G": mean}))[1] == verdict


def test_one_diverged_seed_is_dropped_and_two_leave_it_open(tmp_path: Path) -> None:
    one = primary(_groups(tmp_path / "one", {"SM+G": 0.2}, (("SM+G", 11),)))
    assert (one[0].n, one[0].dropped, one[1]) == (7, 1, "the cost is reproduced (above 5 %)")
    assert primary(_groups(tmp_path / "alike", {}, (("SM+G", 11),)))[1] == "open"  # SM+G that trained flatters it
    groups = _groups(tmp_path / "two", {"SM+G": 0.2}, (("SM+G", 11), ("SM+LN+G", 12)))
    cost, verdict = primary(groups)
    assert math.isnan(cost.mean)
    assert verdict == "open"
    assert secondary(groups)[0].n == 7
    both = _groups(tmp_path / "both", {}, (("SM+G", 11), ("SM+R", 12)))
    relu, *_, with_norm = secondary(both)
    assert math.isnan(relu.holm)
    assert with_norm.holm == pytest.approx(min(1.0, 5 * with_norm.p))
    with pytest.raises(ValueError, match="no run of SM among these has a result"):
        compare("", groups, ("SM", "SM+G"), lambda run: run.score, paired=True)


def test_nothing_is_judged_before_all_runs_have_ended(tmp_path: Path) -> None:
    groups = [group for group in _groups(tmp_path, {}) if group.label != "SM+R"]
    some = group_runs([write_run(tmp_path, "SM+R", study="more", seed=10, data_seed=10)])
    with pytest.raises(ValueError, match=r"1 of 8 runs of SM\+R have a result"):
        primary([*groups, *some])
