"""The sentences at the head of a report, also of classifiers, whose headline is accuracy."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normfree import Run, build_report, load_runs, read_run
from normfree.analysis.entropy import final_heads
from normfree.analysis.groups import group_runs
from normfree.cost.totals import trade_off
from normfree.report.summary import question, sentences
from normfree.report.tables.results import claim_table, difference_table, rate_table, score_table
from tests.synthetic import CONTEXT, write_run


def test_the_summary_counts_in_words(tmp_path: Path) -> None:
    one = group_runs([write_run(tmp_path / "one", label) for label in ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")])
    found = sentences(one)
    result = "Without LayerNorm, ReLU ends 4.2 % below GELU in perplexity"
    assert found[0] == f"{result} (36.1 against 37.7, 1 seed; the paper: 8.2 % below)."
    assert found[1].startswith("With LayerNorm, ReLU ends 2.0 % above GELU")
    assert any(text.endswith("at the end in none of the 2 runs.") for text in sentences(one[:2]))
    assert "One seed per variant: there is no error bar, and a small difference may be chance." in found


def test_the_summary_has_no_mean_of_the_survivors(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM+G"), write_run(tmp_path, "SM+R", broken_probe=True)]
    runs += [write_run(tmp_path, "SM+G", seed=seed, status="diverged") for seed in (1, 2)]
    text = "\n".join(sentences(group_runs(runs)))
    assert "mean over seeds: SM+G NaN (2/3), SM+R " in text
    assert "at the end: SM+G 1 of 3 runs, 2 not measured; SM+R 0 of 1 runs, 1 undecided." in text
    assert "One seed of SM+R: there is no error bar, and a small difference may be chance." in text


def test_of_many_variants_only_the_extremes_are_named(tmp_path: Path) -> None:
    """A sentence with two dozen numbers is a table without columns."""
    runs = [write_run(tmp_path, "SM", tag=f"t{number}", model={"norm": "none"}) for number in range(9)]
    runs += [write_run(tmp_path, "SM+G", seed=seed) for seed in (0, 1)]
    found = sentences(group_runs(runs))
    near_uniform = next(text for text in found if text.startswith("Near-uniform heads"))
    assert near_uniform.count("%") == 2
    assert near_uniform.endswith("the table has all 10 variants.")
    assert any(text.startswith("One seed of 9 of the 10 variants: there is no error bar") for text in found)
    assert any(text.endswith("all variants 2 of 11 runs.") for text in found)


def test_the_comparison_with_most_seeds_comes_first(tmp_path: Path) -> None:
    fast: dict[str, Any] = {"train": {"peak_learning_rate": 1e-2}}
    runs = [write_run(tmp_path, label, tag="a") for label in ("SM+G", "SM+R")]
    values = {("SM+G", 0): 40.0, ("SM+G", 1): 40.0, ("SM+R", 0): 36.0, ("SM+R", 1): 39.0}
    runs += [write_run(tmp_path, label, tag="b", seed=s, perplexity=p, **fast) for (label, s), p in values.items()]
    first, second = (text for text in sentences(group_runs(runs, mix=True)) if "ReLU ends" in text)
    assert first.startswith("Without LayerNorm (b)")
    assert first.endswith("includes 0.")
    assert second.startswith("Without LayerNorm (a)")


def test_a_finished_run_without_perplexity_neither_diverged_nor_learned(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM+G", perplexity=float("nan")), write_run(tmp_path, "SM+R")]
    found = sentences(group_runs(runs))
    assert "Finished without a finite perplexity: SM+G, seed 0." in found
    assert not any("learned" in text or "diverged in" in text for text in found)


def test_runs_of_one_tag_are_compared_with_each_other(tmp_path: Path) -> None:
    """The same recipe twice, on two machines say: a difference between tags would be one of machines."""
    values = {"a": {"SM+LN+G": 34.0, "SM+G": 40.0, "SM+R": 36.0}, "b": {"SM+LN+G": 28.0, "SM+G": 30.0, "SM+R": 29.0}}
    rows = [(tag, label, value) for tag, of_tag in values.items() for label, value in of_tag.items()]
    runs = [write_run(tmp_path, label, tag=tag, perplexity=value) for tag, label, value in rows]
    groups = group_runs(runs)
    against = {row[0]: row[3] for row in score_table(groups).rows}
    assert (against["SM+R (a)"], against["SM+R (b)"], against["SM+LN+G (b)"]) == ("+5.9 %", "+3.6 %", "baseline")
    first, second = sentences(groups)[:2]
    assert first.startswith("Without LayerNorm (a), ReLU ends 10.0 % below GELU in perplexity (36.0 against 40.0")
    assert second.startswith("Without LayerNorm (b), ReLU ends 3.3 % below GELU in perplexity (29.0 against 30.0")
    assert len([row for row in claim_table(groups).rows if row[0].startswith("(b)")]) == 2
    lonely = group_runs([*runs, write_run(tmp_path, "SM+R", tag="c", perplexity=35.0)])
    table = score_table(lonely)
    assert {row[0]: row[3] for row in table.rows}["SM+R (c)"] == "-"
    assert "No change is shown for SM+R (c): more than one SM+LN+G has the same recipe." in table.notes
    assert any("Without LayerNorm (c), ReLU ends 16.7 % above GELU (b)" in text for text in sentences(lonely))


def test_the_summary_compares_nothing_with_a_diverged_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM+G", status="diverged"), write_run(tmp_path, "SM+R")]
    found = sentences(group_runs(runs))
    assert "cannot be compared: 1 of 1 pairs" in found[0]
    place = "step 100, layer 1 (model.layers.1.attention)"
    assert f"SM+G diverged in 1 of 1 runs: seed 0, non-finite activation at {place}." in found


def test_all_variants_that_did_not_learn_are_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, label, perplexity=500.0) for label in ("SM+G", "SM+R")]
    weakest = "the weakest, SM+G, ends at perplexity 500.0, the unigram has 402.5."
    assert f"These runs are too short to judge: {weakest}" in sentences(group_runs(runs))
    runs.append(write_run(tmp_path, "SM+LN+G"))
    assert f"SM+G, SM+R did not learn: {weakest}" in sentences(group_runs(runs))


def test_a_model_has_learned_if_it_beats_the_2_gram(tmp_path: Path) -> None:
    corpus = {**write_run(tmp_path, "SM+G").facts["corpus"], "ngram_perplexity": {"2": 96.3, "5": 60.3}}
    for perplexity, verdict in ((97.0, "These runs are too short to judge"), (90.0, "Every finished run learned")):
        run = write_run(tmp_path, "SM+G", perplexity=perplexity, facts={"corpus": corpus})
        ends = f"the weakest, SM+G, ends at perplexity {perplexity}, the 2-gram has 96.3."
        assert f"{verdict}: {ends}" in sentences(group_runs([run]))


def test_classifiers_are_compared_by_accuracy() -> None:
    folder = Path(__file__).parents[2] / "results/fine-tune"
    groups = group_runs([read_run(run) for run in sorted(folder.glob("*-types-seed0"))])
    said = sentences(groups)
    relu, gelu = (100 * read_run(folder / f"sm-{name}-types-seed0").facts["final"]["accuracy"] for name in "rg")
    direction = "above" if relu > gelu else "below"
    assert f"ends {abs(relu - gelu):.1f} points {direction} GELU" in said[0]
    assert f"in accuracy ({relu:.1f} against {gelu:.1f}, 1 seed)" in said[0]
    assert trade_off(groups) == ([], [])
    yardsticks = {row[0]: row[1] for row in score_table(groups).rows[4:]}
    assert yardsticks.keys() == {"Class of each token", "Majority"}
    assert f"the class of each token has {float(yardsticks['Class of each token']):.1f}." in " ".join(said)


CORPUS = {
    **{"fingerprint": "ca7" * 20, "source": "images", "vocab_size": 4, "unigram_perplexity": 4.0},
    **{"image_size": 8, "num_channels": 1, "majority_accuracy": 0.25, "train_blocks": 160, "validation_blocks": 40},
}
ACCURACY = {"SM+LN+G": (0.885, 0.889, 0.884), "SM+LN+R": (0.880, 0.885, 0.878)}
ACCURACY |= {"SM+G": (0.861, 0.858, 0.866), "SM+R": (0.873, 0.871, 0.876)}


def classify(root: Path, label: str, **words: Any) -> Run:
    family = {"model": {"family": "vision"}, "data": {"source": "images", "paths": ["x"]}, "preset": "fashion-vit"}
    return write_run(root / "runs", label, perplexity=1.5, facts={"corpus": CORPUS}, **family | words)


def test_each_score_has_a_table_of_rates(tmp_path: Path) -> None:
    rates = [{"tag": f"{rate}", "train": {"peak_learning_rate": rate}} for rate in (1e-3, 2e-3)]
    runs = [classify(tmp_path, "SM+R", accuracy=0.8, **rate) for rate in rates]
    runs += [write_run(tmp_path / "text", "SM+R", **rate) for rate in rates]
    page = build_report(runs, tmp_path / "page", mix=True).read_text()
    for score in ("Accuracy on held-out images (%)", "Validation perplexity"):
        assert page.count(f"{score} at each peak learning rate") == 1
    assert {path.name for path in (tmp_path / "page" / "tables").glob("rates*.md")} == {"rates.md", "rates-2.md"}


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
    assert row[2:4] == (f"{mean:+.1f} points", f"{mean - reach:+.1f} to {mean + reach:+.1f} points")
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
