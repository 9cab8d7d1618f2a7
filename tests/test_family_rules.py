"""The rules for vision transformers and encoder-decoders."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from docs.confirm import LABELS
from docs.family_rules import judge
from docs.study_tables import family_table
from normfree.analysis.groups import Group, group_runs
from normfree.store.runs import RunWriter, read_run
from tests.synthetic import write_run

VISION: dict[str, Any] = {"model": {"family": "vision"}, "data": {"source": "fashion_mnist"}}
SEQ2SEQ: dict[str, Any] = {"model": {"family": "encoder_decoder"}}


def _groups(
    folder: Path, heads: dict[str, list[int]], scores: dict[str, list[float]], fields: dict[str, Any]
) -> list[Group]:
    """Runs with so many heads near uniform in their first two layers of four heads, and with these scores."""
    runs = []
    for label in LABELS:
        for seed, score in enumerate(scores[label]):
            spec = {key: dict(value) for key, value in fields.items()}
            status = "finished" if score else "diverged"
            accuracy = {"accuracy": score} if "data" in fields else {"perplexity": score}
            run = write_run(folder, label, seed=seed, status=status, shape=(6, 4), **accuracy, **spec)
            share = np.full(24, 0.1)
            share[: heads.get(label, [0, 0, 0])[seed]] = 0.9
            share[8:] = 0.9  # in later layers, which do not count
            writer = RunWriter(run.folder, run.facts)
            if score:
                writer.log(200, "final", [("entropy_nats", share.reshape(6, 4)), ("ceiling_nats", np.ones(6))])
            writer.update(status=status)
            runs.append(read_run(run.folder))
    return group_runs(runs)


ACCURACY = {"SM+LN+G": [0.9, 0.89, 0.88], "SM+LN+R": [0.88, 0.87, 0.86]}
ACCURACY |= {"SM+G": [0.86, 0.861, 0.862], "SM+R": [0.87, 0.872, 0.871]}


@pytest.mark.parametrize(
    ("with_norm", "without", "verdict"),
    [
        ([0, 0, 0], [8, 8, 8], "not a decoder's alone"),  # without their rounding these had no interval
        ([2, 2, 2], [2, 2, 2], "a decoder's"),
        ([2, 2, 2], [3, 3, 3], "not a decoder's alone"),
        ([2, 2, 2], [2, 2, 3], "open"),
        ([3, 4, 5], [2, 3, 4], "a decoder's"),
    ],
)
def test_overload_is_judged_by_the_first_two_layers(tmp_path: Path, with_norm, without, verdict) -> None:
    groups = _groups(tmp_path, {"SM+LN+G": with_norm, "SM+G": without}, ACCURACY, VISION)
    (overload, found), *_ = judge(groups)
    differences = 12.5 * (np.array(without) - with_norm)
    assert overload.mean == pytest.approx(differences.mean())
    deviation = max(differences.std(ddof=1), 12.5 / math.sqrt(12))
    low, high = stats.t.interval(0.95, 2, differences.mean(), deviation / math.sqrt(3))
    assert overload.interval() == pytest.approx((low, high))
    assert found == verdict


def test_relu_is_compared_with_and_without_layernorm(tmp_path: Path) -> None:
    verdicts = [verdict for _, verdict in judge(_groups(tmp_path, {}, ACCURACY, VISION))]
    assert verdicts[1:] == ["as in decoders", "as in decoders"]
    reverse = ACCURACY | {"SM+G": ACCURACY["SM+R"], "SM+R": ACCURACY["SM+G"], "SM+LN+R": [0.91, 0.90, 0.89]}
    table = family_table(_groups(tmp_path / "reverse", {}, reverse, VISION))
    assert [row[-1] for row in table.rows[1:]] == ["the reverse", "the reverse"]
    ends = stats.ttest_rel(reverse["SM+R"], reverse["SM+G"]).confidence_interval()
    assert table.rows[1][2] == f"{100 * ends.low:+.3f} to {100 * ends.high:+.3f}"
    perplexity = {label: [50 / value for value in values] for label, values in ACCURACY.items()}
    verdicts = [verdict for _, verdict in judge(_groups(tmp_path / "text", {}, perplexity, SEQ2SEQ))]
    assert verdicts[1:] == ["as in decoders", "as in decoders"]


def test_nothing_is_judged_of_poor_or_missing_runs(tmp_path: Path) -> None:
    poor = ACCURACY | {"SM+LN+G": [0.89, 0.88, 0.865]}
    with pytest.raises(ValueError, match=r"SM\+LN\+G ends at 87.83 on average, and 88.00 is needed"):
        judge(_groups(tmp_path / "poor", {}, poor, VISION))
    with pytest.raises(ValueError, match=r"2 of 3 runs of SM\+R have a result"):
        judge(_groups(tmp_path / "few", {}, ACCURACY | {"SM+R": [0.9, 0.9]}, VISION))
    unigram = {label: [201.5, 201.0, 202.0] for label in LABELS}
    with pytest.raises(ValueError, match=r"ends at 201.50 on average, and 201.25 is needed"):
        judge(_groups(tmp_path / "unigram", {}, unigram, SEQ2SEQ))
    lost = ACCURACY | {"SM+G": [0.86, 0, 0]}
    rows = family_table(_groups(tmp_path / "lost", {}, lost, VISION)).rows
    assert [row[-2:] for row in rows] == [("2", "open"), ("2", "open"), ("0", "as in decoders")]
