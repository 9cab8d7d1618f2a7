"""Reports on vision transformers: accuracy is the headline, and every patch is visible."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normfree.analysis.entropy import ceiling_words, final_heads
from normfree.analysis.groups import group_runs
from normfree.report import build_report
from normfree.report.summary import question, sentences
from normfree.report.tables.results import claim_table, difference_table, rate_table, score_table
from normfree.report.tables.runs import run_table
from normfree.store.runs import Run, load_runs
from tests.synthetic import CONTEXT, write_run

CORPUS = {
    **{"fingerprint": "ca7" * 20, "source": "images", "vocab_size": 4, "unigram_perplexity": 4.0},
    **{"image_size": 8, "num_channels": 1, "majority_accuracy": 0.25, "train_blocks": 160, "validation_blocks": 40},
}
ACCURACY = {"SM+LN+G": (0.885, 0.889, 0.884), "SM+LN+R": (0.880, 0.885, 0.878), "SM+G": (0.861, 0.858, 0.866)}
ACCURACY["SM+R"] = (0.873, 0.871, 0.876)


def classify(root: Path, label: str, **words: Any) -> Run:
    family = {"model": {"family": "vision"}, "data": {"source": "images", "paths": ["x"]}, "preset": "fashion-vit"}
    return write_run(root, label, perplexity=1.5, facts={"corpus": CORPUS}, **family | words)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return [
        classify(tmp_path / "runs", label, seed=seed, accuracy=accuracy)
        for label, of_seed in ACCURACY.items()
        for seed, accuracy in enumerate(of_seed)
    ]


def test_differences_of_accuracy_are_in_points(runs: list[Run]) -> None:
    groups = group_runs(runs)
    rows = {row[0]: row for row in score_table(groups).rows}
    ours, theirs = (100 * np.array(ACCURACY[label]) for label in ("SM+R", "SM+G"))
    assert rows["SM+R"][1] == f"{ours.mean():.2f} +- {ours.std(ddof=1):.2f}"
    assert rows["Majority"][1] == "25.00"
    row = next(row for row in difference_table(groups).rows if row[0] == "SM+R against SM+G")
    difference = ours - theirs
    reach = 4.303 * difference.std(ddof=1) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert row[2] == f"{difference.mean():+.1f} points"
    assert row[3] == f"{difference.mean() - reach:+.1f} points to {difference.mean() + reach:+.1f} points"
    assert {row[5] for row in difference_table(groups).rows} == {"-"}  # the paper has no accuracies


def test_claims_turn_round_where_higher_is_better(runs: list[Run]) -> None:
    verdicts = {row[0][:3]: row[1] for row in claim_table(group_runs(runs)).rows}
    assert (verdicts["(a)"], verdicts["(b)"]) == ("holds", "holds")


def test_the_summary_speaks_of_accuracy(runs: list[Run]) -> None:
    groups = group_runs(runs)
    assert question(groups) == "Without LayerNorm, does ReLU or GELU end with the higher accuracy?"
    text = "\n".join(sentences(groups))
    assert "Without LayerNorm, ReLU ends 1.2 points above GELU in accuracy (87.3 against 86.2, 3 seeds)" in text
    assert "Every finished run learned: the weakest, SM+G, ends at accuracy 85.8, the majority has 25.0." in text
    assert "perplexity" not in text


def test_a_run_without_finite_layers_has_the_ceiling_of_its_family(tmp_path: Path) -> None:
    run = classify(tmp_path, "SM+G", accuracy=0.8, broken_probe=True)
    heads = final_heads(run)
    assert heads is not None
    assert heads.ceiling_L[-1] == pytest.approx(math.log(CONTEXT))
    assert ceiling_words([run]) == "ceiling"


def test_the_best_rate_has_the_highest_accuracy(tmp_path: Path) -> None:
    rates = {1e-3: 0.86, 2e-3: 0.88, 4e-3: 0.87}
    sweep = [
        classify(tmp_path, "SM+G", accuracy=accuracy, tag=f"lr{rate}", train={"peak_learning_rate": rate})
        for rate, accuracy in rates.items()
    ]
    table = rate_table(group_runs(sweep, mix=True))
    assert table.titles[-1] == "Highest at"
    assert table.rows[0][-1] == "2e-3"


def test_a_page_of_both_families_keeps_them_apart(runs: list[Run], tmp_path: Path) -> None:
    decoder = write_run(tmp_path / "runs", "SM+G", study="text")
    page = build_report([*runs, decoder], tmp_path / "out", mix=True).read_text(encoding="utf-8")
    headings = re.findall(r"<h[23][^>]*>([^<]*)", page)
    assert {"Final accuracy", "Final perplexity"} <= {*headings}
    assert "images of 8 x 8 pixels with 1 channel(s), 4 classes" in page
    assert {"part1-accuracy.md", "part2-perplexity.md"} <= {p.name for p in (tmp_path / "out" / "tables").iterdir()}
    assert run_table(group_runs(runs)).titles[3] == "Accuracy"
    assert load_runs(tmp_path / "runs")["accuracy"].notna().sum() == len(runs)
