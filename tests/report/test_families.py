"""Reports on vision transformers: accuracy is the headline, and every patch is visible."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normfree.analysis.entropy import final_heads
from normfree.analysis.groups import group_runs
from normfree.report import build_report
from normfree.report.summary import question, sentences
from normfree.report.tables.results import claim_table, difference_table, rate_table, score_table
from normfree.store.runs import Run, load_runs
from tests.synthetic import CONTEXT, write_run

CORPUS = {
    **{"fingerprint": "ca7" * 20, "source": "images", "vocab_size": 4, "unigram_perplexity": 4.0},
    **{"image_size": 8, "num_channels": 1, "majority_accuracy": 0.25, "train_blocks": 160, "validation_blocks": 40},
}
ACCURACY = {"SM+LN+G": (0.885, 0.889, 0.884), "SM+LN+R": (0.880, 0.885, 0.878)}
ACCURACY |= {"SM+G": (0.861, 0.858, 0.866), "SM+R": (0.873, 0.871, 0.876)}


def classify(root: Path, label: str, **words: Any) -> Run:
    family = {"model": {"family": "vision"}, "data": {"source": "images", "paths": ["x"]}, "preset": "fashion-vit"}
    return write_run(root / "runs", label, perplexity=1.5, facts={"corpus": CORPUS}, **family | words)


def test_scores_and_claims_are_those_of_accuracies(tmp_path: Path) -> None:
    of_all = ((label, seed, accuracies[seed]) for label, accuracies in ACCURACY.items() for seed in range(3))
    runs = [classify(tmp_path, label, seed=seed, accuracy=accuracy) for label, seed, accuracy in of_all]
    groups = group_runs(runs)
    scores = {row[0]: row[1] for row in score_table(groups).rows}
    ours, theirs = (100 * np.array(ACCURACY[label]) for label in ("SM+R", "SM+G"))
    assert scores["SM+R"] == f"{ours.mean():.2f} +- {ours.std(ddof=1):.2f}"
    assert scores["Majority"] == "25.00"
    mean, reach = (ours - theirs).mean(), 4.303 * (ours - theirs).std(ddof=1) / math.sqrt(3)  # Student's t
    row = next(row for row in difference_table(groups).rows if row[0] == "SM+R against SM+G")
    assert row[2:4] == (f"{mean:+.1f} points", f"{mean - reach:+.1f} points to {mean + reach:+.1f} points")
    assert row[5] == "-"  # the paper has no accuracies
    assert [row[1] for row in claim_table(groups).rows[:2]] == ["holds", "holds"]  # higher is better
    assert question(groups) == "Without LayerNorm, does ReLU or GELU end with the higher accuracy?"
    text = "\n".join(sentences(groups))
    assert "Without LayerNorm, ReLU ends 1.2 points above GELU in accuracy (87.3 against 86.2, 3 seeds)" in text
    assert "Every finished run learned: the weakest, SM+G, ends at accuracy 85.8, the majority has 25.0." in text
    runs.append(write_run(tmp_path / "runs", "SM+G", study="text"))
    page = build_report(runs, tmp_path / "out", mix=True).read_text(encoding="utf-8")
    assert {"Final accuracy", "Final perplexity"} <= {*re.findall(r"<h[23][^>]*>([^<]*)", page)}
    assert {"part1-accuracy.md", "part2-perplexity.md"} <= {p.name for p in (tmp_path / "out" / "tables").iterdir()}
    assert load_runs(tmp_path / "runs")["accuracy"].notna().sum() == 12


def test_layers_without_finite_heads_have_the_family_s_ceiling(tmp_path: Path) -> None:
    heads = final_heads(classify(tmp_path, "SM+G", accuracy=0.8, broken_probe=True))
    assert heads is not None
    assert heads.ceiling_L[-1] == pytest.approx(math.log(CONTEXT))


def test_the_best_rate_has_the_highest_accuracy(tmp_path: Path) -> None:
    rates = {1e-3: 0.86, 2e-3: 0.88, 4e-3: 0.87}
    train = {rate: {"tag": f"lr{rate}", "train": {"peak_learning_rate": rate}} for rate in rates}
    sweep = [classify(tmp_path, "SM+G", accuracy=rates[rate], **train[rate]) for rate in rates]
    table = rate_table(group_runs(sweep, mix=True))
    assert (table.titles[-1], table.rows[0][-1]) == ("Highest at", "2e-3")
