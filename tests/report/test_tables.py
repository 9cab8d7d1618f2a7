"""What tables say, and that no cell can break out of its format."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from docs.study_tables import unfinished_table, zoo_table
from normfree.analysis.entropy import causal_ceiling
from normfree.analysis.groups import group_runs
from normfree.cost.estimate import sizes_of
from normfree.cost.totals import of_run
from normfree.report.tables.results import (
    claim_table,
    difference_table,
    gap_table,
    overload_table,
    range_table,
    rate_table,
    score_table,
)
from normfree.report.tables.runs import run_table, slope_table, verdict_table
from normfree.report.tables.table import Table, to_csv, to_html, to_latex, to_markdown, without_empty_columns
from normfree.spec.run import RunSpec
from normfree.store.runs import Run, RunWriter, read_run
from tests.synthetic import rewritten, study, write_run

NASTY = "<script>alert(1)</script> & 50%_$#{x}~^\\ | `code` [a](b)"


def rows_of(table: Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.titles, row, strict=True)) for row in table.rows}


def rows_by_name(make: Callable[..., Table], runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    return rows_of(make(group_runs(runs)))


NASTY_TABLE = Table("nasty", NASTY, ("Variant", NASTY), ((NASTY, "+1.0 %"), ("-", "-4.2 %")), (NASTY,))


def test_perplexity_has_spread_change_floor_and_paper(tmp_path: Path) -> None:
    table = score_table(group_runs(study(tmp_path)))
    rows = rows_of(table)
    assert rows["SM+LN+R"]["Seeds"] == "1"
    assert "quick/sm-ln-r-seed1 is left out: interrupted at step 100." in table.notes
    assert rows["SM+LN+G"]["Against SM+LN+G"] == "baseline"
    assert rows["SM+G"]["Perplexity"] == "38.08 +- 0.38"
    assert rows["SM+G"]["Seeds"] == "3"
    assert rows["SM+G"]["Against SM+LN+G"] == "+10.2 % (n = 2)"  # 37.7 / 34.2 in each of the two common seeds
    assert rows["SM+G"]["Paper, against SM+LN+G"] == "+18.9 %"
    assert rows["SM"]["Perplexity"] == "NaN (1/2)"
    assert rows["Unigram"]["Perplexity"] == "402.50"
    corpus = {**write_run(tmp_path, "SM+G").facts["corpus"], "ngram_perplexity": {"2": 96.3, "5": 60.32}}
    rows = rows_by_name(score_table, [write_run(tmp_path, "SM+G", facts={"corpus": corpus})])
    assert (rows["2-gram"]["Perplexity"], rows["5-gram"]["Perplexity"]) == ("96.30", "60.32")


def test_a_sweep_has_no_column_of_the_paper(tmp_path: Path) -> None:
    sweep = [write_run(tmp_path, "SM+G", tag=tag) for tag in ("lr1", "lr2")]
    others = [write_run(tmp_path, label, tag="lr1") for label in ("SM+R", "SM+LN+G")]
    table = without_empty_columns(score_table(group_runs([*sweep, *others])))
    assert table.titles[-1] == "Bits per byte"
    assert not [note for note in table.notes if note.startswith("Paper")]
    once = score_table(group_runs([sweep[0], *others]))
    assert rows_of(once)["SM+G (lr1)"]["Paper's model"] == "GPT-2 125M, T=128"


def test_without_the_baseline_nothing_is_compared_with_it(tmp_path: Path) -> None:
    table = without_empty_columns(score_table(group_runs([write_run(tmp_path, label) for label in ("SM+G", "SM+R")])))
    assert table.titles == ("Variant", "Perplexity", "Seeds", "Bits per byte")


def test_another_corpus_than_expected_is_said(tmp_path: Path) -> None:
    same = write_run(tmp_path, "SM+G", data={"expected_fingerprint": "c0ffee" * 10})
    other = write_run(tmp_path, "SM+R", data={"expected_fingerprint": "deadbeef" * 8})
    assert not [n for n in score_table(group_runs([same])).notes if n.startswith("Corpus")]
    (note,) = (n for n in score_table(group_runs([same, other])).notes if n.startswith("Corpus"))
    assert "c0ffeec0ffee" in note
    assert "deadbeefdead" in note


def test_differences_pair_seeds(tmp_path: Path) -> None:
    rows = rows_by_name(difference_table, study(tmp_path))
    row = rows["SM+R against SM+G"]
    assert (row["Difference in perplexity"], row["Pairs"], row["Paper"]) == ("-4.2 %", "3", "-8.2 %")
    assert rows["SM+LN+R against SM+LN+G"]["95 % interval"] == "-"
    kinds = (rows["SM+R against SM+G"]["Kind"], rows["SM against SM+R"]["Kind"])
    assert kinds == ("the paper's", "exploratory")
    assert len(rows) == math.comb(10, 2)  # every two of ten variants share seed 0


def test_rates_are_compared_on_common_seeds_and_edges_said(tmp_path: Path) -> None:
    def runs(label: str, tag: str, rate: float, *perplexities: float, **more: Any) -> list[Run]:
        train = {"peak_learning_rate": rate, **more}
        ends: Any = [{"status": "diverged"} if math.isnan(end) else {"perplexity": end} for end in perplexities]
        places = enumerate(ends)
        return [write_run(tmp_path, label, tag=tag, seed=seed, train=dict(train), **end) for seed, end in places]

    screen = [*runs("SM+R", "", 1e-3, 24.0, 26.0, 11.0), *runs("SM+R", "b", 2e-3, 21.0, 23.0)]
    screen += [*runs("SM+R", "c", 4e-3, 22.0, math.nan), *runs("SM+R", "repeated", 1e-3, 20.0)]
    screen += [*runs("SM+LN+G", "", 1e-3, 25.0), *runs("SM+LN+G", "b", 2e-3, 22.0)]
    screen += [*runs("SM+G", "", 1e-3, 24.0), *runs("SM+G", "c", 4e-3, 9.0, warmup_share=0.3)]
    table = rate_table(group_runs(screen, mix=True))
    assert table.titles == ("Variant", "1e-3", "2e-3", "4e-3", "Seeds", "Lowest at")
    assert table.rows == [
        ("SM+LN+G", "25.00", "22.00", "-", "1", "2e-3, edge of the grid"),
        ("SM+R", "25.00 +- 1.41", "22.00 +- 1.41", "NaN (1/2)", "2", "2e-3"),
    ]
    assert table.notes[2:] == ["quick/sm-r-repeated-seed0 is left out: it repeats a seed of SM+R at 1e-3."]
    only_diverged = [run for run in screen if run.label == "SM+R (c)" and run.status == "diverged"]
    rows = rate_table(group_runs([*only_diverged, *screen[:1]], mix=True)).rows
    assert rows == [("SM+R", "-", "NaN (1/1)", "0", "-")]  # no common seed: nothing is compared


def test_grids_of_several_presets_are_named_by_these(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, "SM+R", study=preset, preset=preset, tag=f"{rate}", shape=shape,
                  model={"num_hidden_layers": shape[0]}, train={"peak_learning_rate": rate})
        for preset, shape in (("cpu", (12, 4)), ("cpu-pythia", (6, 4))) for rate in (1e-3, 2e-3)
    ]  # fmt: skip
    names = {row[0] for row in rate_table(group_runs(runs, mix=True)).rows}
    assert names == {"SM+R [preset=cpu]", "SM+R [preset=cpu-pythia]"}


def test_claims_hold_only_where_their_interval_says_so(tmp_path: Path) -> None:
    """By hand: 36.1 against 37.7 scaled by 1 + seed/100 is the same ratio for each seed."""
    rows = rows_by_name(claim_table, study(tmp_path))
    better = rows["(b) Without it, ReLU is better"]
    assert (better["Difference"], better["Pairs"], better["Verdict"]) == ("-4.2 %", "3", "holds")
    assert rows["(a) With LayerNorm, ReLU is worse than GELU"]["Verdict"] == "undecided"  # one pair
    top = rows["(c) GELU puts more heads into the top quarter"]
    assert (top["Measured"], top["Verdict"]) == ("share of heads", "holds")
    assert not [claim for claim in rows if claim.startswith("(g)")]  # no such runs
    runs = [write_run(tmp_path / "2", "SM+G", seed=seed, perplexity=30.0 + seed) for seed in range(3)]
    runs += [write_run(tmp_path / "2", "SM+R", seed=seed, perplexity=33.1 + 1.1 * seed) for seed in range(3)]
    row = rows_by_name(claim_table, runs)["(b) Without it, ReLU is better"]
    assert (row["Verdict"], row["Difference"]) == ("does not hold", "+10.3 %")


def test_a_claim_about_heads_pairs_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval of (20, 10, 18) points: mean 16, deviation 5.2915, times 4.303 / sqrt(3)."""
    runs = [write_run(tmp_path, label, seed=seed) for label in ("SM+G", "SM+R") for seed in range(3)]
    shares = {("SM+G", 0): 0.5, ("SM+G", 1): 0.4, ("SM+G", 2): 0.6, ("SM+R", 0): 0.3, ("SM+R", 1): 0.3}
    monkeypatch.setattr("normfree.analysis.pairs.trained_heads", lambda run: (run.label, run.seed))
    monkeypatch.setattr("normfree.analysis.pairs.top_quarter_share", lambda run: shares.get(run, 0.42))
    row = rows_by_name(claim_table, runs)["(c) GELU puts more heads into the top quarter"]
    assert (row["Difference"], row["95 % interval"]) == ("+16.0 points", "+2.9 to +29.1 points")


def test_unfinished_runs_are_compared_at_their_last_common_step(tmp_path: Path) -> None:
    """By hand: synthetic losses at step 100 of 200, against a perplexity of 20 there."""
    runs = [write_run(tmp_path, "SM+G", seed=0), write_run(tmp_path, "SM+G", seed=1, status="interrupted")]
    for seed in (0, 1):
        run = write_run(tmp_path, "SM+R", seed=seed, status="interrupted")
        text = (run.folder / "metrics.jsonl").read_text()
        runs.append(rewritten(run, re.sub(r'("step": 100, .* "perplexity", "value": ).*', r"\1 20.0}", text)))
    table = unfinished_table(group_runs(runs))
    losses = [3.5 + 3.5 * math.exp(-100 / 60) + 0.05 * math.sin(100 + seed) for seed in (0, 1)]
    change = np.mean([20 / math.exp(loss) - 1 for loss in losses])
    row = rows_of(table)["SM+R"]
    assert (row["Perplexity"], row["Seeds"]) == ("20.00 +- 0.00", "2")
    assert row["Against SM+G"].startswith(f"{100 * change:+.1f} % (")
    assert rows_of(table)["SM+G"]["Against SM+G"] == "baseline"
    assert "step 100 of 200" in table.caption


@pytest.mark.parametrize(
    ("steps", "cells"),
    [
        (500, {"At 20 %": "+0.0 %", "At 60 %": "NaN (1/2)", "At 80 %": "NaN (1/2)", "At 100 %": "NaN (1/2)"}),
        # At 40 % the nearest evaluation is step 50, before the divergence at 60; at 60 % none is near.
        (120, {"At 40 %": "+0.0 %", "At 60 %": "-", "At 80 %": "NaN (1/2)"}),
    ],
)
def test_a_diverged_seed_makes_the_gap_nan_from_then_on(tmp_path: Path, steps: int, cells: dict[str, str]) -> None:
    runs = [write_run(tmp_path, label, steps=steps, seed=seed) for label in ("SM+G", "SM+R") for seed in (0, 1)]
    runs[0] = write_run(tmp_path / "other", "SM+G", steps=steps, status="diverged")
    row = rows_by_name(gap_table, runs)["SM+R against SM+G"]
    assert {title: row[title][: len(cell)] for title, cell in cells.items()} == cells
    assert row["Pairs"] == "2"


def test_a_diverged_run_leaves_a_claim_undecided(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, label, seed=seed) for label in ("SM+G", "SM+R") for seed in (0, 1)]
    runs += [write_run(tmp_path, "SM+G", seed=2, status="diverged"), write_run(tmp_path, "SM+R", seed=2)]
    row = rows_by_name(claim_table, runs)["(c) GELU puts more heads into the top quarter"]
    assert (row["Difference"], row["Verdict"]) == ("NaN (1/3)", "undecided")


def test_what_was_not_measured_is_a_dash_and_no_nan(tmp_path: Path) -> None:
    """Two layers have no late third; probes of 30 steps come at 0 and 20 only."""
    row = rows_by_name(overload_table, [write_run(tmp_path, "SM+G", shape=(2, 4), steps=30)])["SM+G"]
    assert (row["Late third"], row["At 10 %"], row["At 100 %"]) == ("-", "-", "-")
    assert row["Early third"] == "100.0"


def test_overload_is_told_by_depth_and_over_training(tmp_path: Path) -> None:
    """SM+G falls with depth from 1.0 to 0.4 of the ceiling (+- 0.08): of 4 layers 0 and 1 are early."""
    runs = study(tmp_path)
    rows = rows_by_name(overload_table, runs)
    row = rows["SM+G"]

    def early_percents(label: str) -> list[float]:
        finals = [np.array(run.last("final", "entropy_nats")) for run in runs if run.label == label]
        return [100 * (entropy_LH[:2] >= 0.75 * causal_ceiling(32)).mean() for entropy_LH in finals]

    early, of_norm = early_percents("SM+G"), early_percents("SM+LN+G")
    assert row["Early third"] == f"{np.mean(early):.1f} +- {np.std(early, ddof=1):.1f}"
    assert (row["Middle third"], row["Late third"]) == ("0.0 +- 0.0", "0.0 +- 0.0")
    assert row["At 10 %"] == "100.0 +- 0.0"
    assert row["Seeds"] == "3"
    common = min(len(early), len(of_norm))
    assert row["Early, less SM+LN+G"] == f"{np.mean(early[:common]) - np.mean(of_norm[:common]):+.1f} points"
    assert rows["SM"]["Early third"] == "NaN (1/2)"
    paper = rows["SM+G, paper"]
    assert (paper["All layers"], paper["At 10 %"]) == ("57.6", "-")


def test_ranges_pool_seeds_and_count_broken_heads(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM", seed=seed, broken_probe=bool(seed)) for seed in (0, 1)]
    table = range_table(group_runs(runs))
    row = next(row for row in table.rows if row[:2] == ("SM", "causal"))
    values = dict(zip(table.titles, row, strict=True))
    assert (values["Seeds"], values["Heads"], values["NaN heads"]) == ("2", "32", "12")
    shares = [float(values[title].rstrip(" %")) for title in ("[0, 1/4)", "[1/4, 1/2)", "[1/2, 3/4)", "[3/4, 1]")]
    assert abs(sum(shares) - 100 * 20 / 32) < 0.2


def test_shares_of_training_are_told_in_tokens_too(tmp_path: Path) -> None:
    train = {"batch_sequences": 512, "micro_batch_sequences": 512}  # of 32 tokens
    runs = [write_run(tmp_path, label, train=train) for label in ("SM+G", "SM+R")]
    assert "At 40 % (1.3 M)" in gap_table(group_runs(runs)).titles
    runs += [write_run(tmp_path, "SM+R", seed=1, steps=100, tag="x")]
    assert "At 40 %" in gap_table(group_runs(runs, mix=True)).titles


def test_a_killed_run_is_as_far_as_its_metrics(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM+G"), write_run(tmp_path, "SM+R", status="running", facts={"steps_done": 20})]
    rows = rows_by_name(run_table, runs)
    batch = runs[1].spec["train"]["batch_sequences"]
    row = rows["quick/sm-r-seed0"]
    assert (row["Steps"], row["Tokens"]) == ("100", f"{100 * batch * 32:,}")
    assert "quick/sm-r-seed0 is left out: stopped at step 100." in score_table(group_runs(runs)).notes


def test_verdicts_name_layers_heads_and_steps(tmp_path: Path) -> None:
    rows = rows_by_name(verdict_table, study(tmp_path))
    assert rows["quick/sm-g-seed0"]["Overload"] == "yes: 100 % of the heads in layers 0-1, since step 0"
    assert rows["quick/sm-r-seed0"]["Overload"].startswith("no: ")
    one_layer = rows_by_name(verdict_table, [write_run(tmp_path / "one", "SM+G", shape=(1, 4))])
    assert one_layer["quick/sm-g-seed0"]["Overload"] == "yes: 100 % of the heads in layer 0, since step 0"
    assert rows["quick/sm-seed1"]["Collapse"] == "undecided"
    slopes = rows["quick/sm-leaky--per-layer-seed0"]["Slopes"]
    assert slopes.startswith("apart: from -0.090 (layer 3) to 0.210 (layer 0)")


def test_runs_say_where_they_diverged_and_their_speed(tmp_path: Path) -> None:
    rows = rows_by_name(run_table, study(tmp_path))
    place = "step 100, layer 1 (model.layers.1.attention)"
    assert rows["quick/sm-seed1"]["Status"] == f"diverged: non-finite activation at {place}"
    assert (rows["quick/sm-seed1"]["Perplexity"], rows["quick/sm-g-seed0"]["Perplexity"]) == ("-", "37.70")
    assert rows["quick/sm-g-seed0"]["Time"] == "1 min 35 s"
    assert rows["quick/sm-g-seed0"]["Tokens per second"] == "21,105"
    here = {"device": "cpu", "processor": "AMD EPYC", "instruction_set": "AVX2"}
    run = write_run(tmp_path / "named", "SM+G", facts={"environment": here})
    assert rows_by_name(run_table, [run])["quick/sm-g-seed0"]["Machine"] == "AMD EPYC AVX2"


def test_slopes_run_from_relu_to_identity(tmp_path: Path) -> None:
    table = slope_table(group_runs(study(tmp_path)))
    assert [row[0] for row in table.rows][:3] == ["SM+R", "SM+leaky, fixed", "SM"]
    rows = rows_of(table)
    assert (rows["SM"]["First non-finite step"], rows["SM"]["Non-finite rows"]) == ("80", "768")
    assert rows["SM+leaky, shared"]["Slope at the start"] == "0.01"
    assert rows["SM+leaky, shared"]["Gone to zero"] == "no"  # it ends at 0.11
    assert rows["SM+R"]["Gone to zero"] == "-"
    assert rows["SM+G/leaky, last"]["Slope at the end"] == "0.210 (layer 3), the only layer with one"


def test_a_slope_that_is_no_number_is_shown_as_such(tmp_path: Path) -> None:
    run = write_run(tmp_path, "SM+leaky, per layer", status="diverged")
    writer = RunWriter(run.folder, run.facts)
    writer.log(100, "probe", [("negative_slope", [0.1, math.nan, 0.2, 0.3])])
    writer.update(status="diverged")
    row = rows_by_name(slope_table, [read_run(run.folder)])["SM+leaky, per layer"]
    assert row["Slope at the end"].startswith("apart at step 100: from nan (layer 1) to nan (layer 1)")


def test_skipped_steps_are_shown(tmp_path: Path) -> None:
    skipped = [{"step": step, "layer": 0, "module": "model.layers.0", "kind": "loss"} for step in (7, 9)]
    run = write_run(tmp_path, "SM", facts={"skipped_steps": skipped})
    leaky = write_run(tmp_path, "SM+leaky, fixed")
    assert rows_by_name(slope_table, [run, leaky])["SM"]["First non-finite step"] == "7"
    (row,) = rows_by_name(run_table, [run]).values()
    assert row["Status"] == "finished, 2 non-finite steps skipped (first: 7)"


def test_the_zoo_compares_every_arm_with_layernorm(tmp_path: Path) -> None:
    runs, sizes = [], {"hidden_size": 64, "num_attention_heads": 4}
    for label, perplexities in {"SM+LN+G": (20.0, 21.0), "SM+G": (22.0, 24.0)}.items():
        for seed, perplexity in enumerate(perplexities):
            run = write_run(tmp_path, label, seed=seed, perplexity=perplexity, model=sizes)
            writer = RunWriter(run.folder, run.facts)
            measured = [("first_token_mass", [[0.1 + seed, 0.3]]), ("largest_to_median", [[5.0, 9.0 + seed]])]
            writer.log(200, "final", measured)
            writer.update(status="finished")
            runs.append(read_run(run.folder))
    runs += [write_run(tmp_path, "SM", seed=seed, status="diverged", model=sizes) for seed in (0, 1)]
    rows = rows_by_name(zoo_table, runs)
    assert rows["SM+LN+G"]["ln perplexity less SM+LN+G"] == "baseline"
    assert [rows["SM"][name] for name in ("Middle", "Largest activation", "Diverged")] == ["-", "-", "2"]
    logs = [np.log([22.0, 24.0]), np.log([20.0, 21.0])]
    low, high = stats.ttest_ind(*logs, equal_var=False).confidence_interval()
    difference = logs[0].mean() - logs[1].mean()
    assert rows["SM+G"]["ln perplexity less SM+LN+G"] == f"{difference:+.3f} ({low:+.3f} to {high:+.3f})"
    assert (rows["SM+G"]["On the first token"], rows["SM+G"]["Largest activation"]) == ("0.45", "10")
    size = sizes_of(RunSpec.from_dict(runs[2].spec), "cpu")
    in_layers = size.layer_keeps * size.layers * size.width * 32 * runs[2].spec["data"]["context"]
    assert float(rows["SM+G"]["Kept (MB)"]) == pytest.approx(in_layers / 1e6, abs=0.5)
    assert rows["SM+G"]["Sent (MB)"] == f"{of_run(runs[2]).bytes / 1e6:,.0f}"


def test_html_and_markdown_escape_every_cell() -> None:
    text = to_html(NASTY_TABLE)
    assert text.count("&lt;script&gt;") == 6
    assert all(word in text for word in ('scope="col"', 'scope="row"'))
    lines = [line for line in to_markdown(NASTY_TABLE).splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {3}
    assert "<script" not in "".join((text, *lines))


def test_latex_escapes_what_it_would_obey() -> None:
    text = to_latex(NASTY_TABLE)
    assert r"50\%\_\$\#\{x\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in text
    assert r"\textless{}script\textgreater{}" in text
    assert text.count(r"\begin{tabular}{lr}") == 1
    table = Table("t", "c", ("a", "b"), (("x", "1.0 +- 0.1"),))
    assert r"1.0 $\pm$ 0.1" in to_latex(table)
    assert "1.0 \N{PLUS-MINUS SIGN} 0.1" in to_markdown(table)


def test_csv_round_trips() -> None:
    assert list(csv.reader(io.StringIO(to_csv(NASTY_TABLE))))[1:] == [list(row) for row in NASTY_TABLE.rows]
