"""Ceilings, ranges, verdicts, seeds and groups, also of the paper's published heatmaps."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normfree.analysis import published
from normfree.analysis.entropy import (
    Heads,
    causal_ceiling,
    final_heads,
    layer_means,
    pooled_ranges,
    range_counts,
    trained_heads,
)
from normfree.analysis.groups import group_runs, parts_of
from normfree.analysis.pairs import all_pairs, pairs_of
from normfree.analysis.seeds import paired_difference, summarise
from normfree.analysis.verdicts import Slopes, collapse, fixed_slope, overload, slope_layers, slopes
from normfree.store.runs import Run
from tests.synthetic import another_corpus, write_run


def heads(entropy_LH: object, *, ceiling: float = 4.0, step: int = 0) -> Heads:
    entropy_LH = np.array(entropy_LH, dtype=float)
    return Heads(entropy_LH, np.full(len(entropy_LH), ceiling), step, range(len(entropy_LH)))


@pytest.mark.parametrize("context", [1, 2, 32, 128, 1024])
def test_causal_ceiling_is_the_mean_log_of_visible_tokens(context: int) -> None:
    rows = np.log(np.arange(1, context + 1))
    assert causal_ceiling(context) == pytest.approx(rows.mean(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("entropy_LH", "maximum", "finite", "nonfinite"),
    [
        ([[0.0, 0.99, 1.0], [2.0, 3.0, 4.0]], 4.0, (2, 1, 1, 2), 0),  # a quarter has its lower edge, the last both
        ([[4.0000001]], 4.0, (0, 0, 0, 1), 0),  # rounding
        ([[0.0, 0.0]], 0.0, (2, 0, 0, 0), 0),
        ([[math.nan, 0.0, math.inf, 3.9]], 4.0, (1, 0, 0, 1), 2),
        ([[1.0], [1.0]], [1.0, 4.0], (0, 1, 0, 1), 0),  # a maximum per layer
    ],
)
def test_heads_are_counted_by_quarter(entropy_LH: Any, maximum: Any, finite: tuple[int, ...], nonfinite: int) -> None:
    counts = range_counts(entropy_LH, maximum)
    assert (counts.finite_R, counts.nonfinite, counts.heads) == (finite, nonfinite, np.size(entropy_LH))
    assert counts.shares == [count / np.size(entropy_LH) for count in finite]


def test_normalisers_are_observed_maximum_log_t_and_causal_ceiling(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM+G", broken_probe=True), write_run(tmp_path, "SM+R", data={"context": 64})]
    pooled = pooled_ranges(group_runs(runs, mix=True))
    observed = max(np.nanmax(heads.entropy_LH) for run in runs if (heads := trained_heads(run)))
    expected = {"observed": [observed] * 2, "log_t": [math.log(32), math.log(64)], "causal": [causal_ceiling(32)] * 2}
    maxima = {name: [of_group[name].maximum_nats for of_group in pooled.values()] for name in expected}
    assert {name: pytest.approx(values) for name, values in expected.items()} == maxima


@pytest.mark.parametrize(
    ("entropy_LH", "holds"),
    [
        ([[3.9, 1.0], [3.9, 1.0], [1.0, 1.0], [1.0, 1.0]], True),  # ceil(4 / 3) = 2 early layers
        ([[3.9, 1.0], [1.0, 1.0], [3.9, 1.0], [3.9, 1.0]], False),
        ([[1.0, 1.0], [3.0, 3.0], [1.0, 1.0], [1.0, 1.0]], True),
        ([[math.nan, 1.0]], None),
        ([[math.nan, 1.0, 1.0]], False),
        ([[math.nan, 3.9]], True),
    ],
)
def test_overload_needs_half_of_the_early_heads(entropy_LH: Any, holds: bool | None) -> None:
    assert overload(heads(entropy_LH)).holds is holds


def test_overload_says_since_when_without_a_break() -> None:
    probes = [heads([[value]], step=100 * i) for i, value in enumerate((3.9, 1.0, 3.9, 3.9))]
    assert overload(probes[-1], probes).since_step == 200
    assert overload(probes[1], probes[:2]).since_step is None


def test_collapse_names_heads_and_the_first_step() -> None:
    probes = [heads([[1.0, 1.0]], step=0), heads([[1.0, 0.05]], step=50), heads([[1.0, 0.02]], step=100)]
    assert str(collapse(probes[-1], probes)) == "yes: layer 0 head 1 (lowest 0.020 nats), since step 50"
    assert str(collapse(heads([[math.nan, 1.0]]))) == "undecided"
    assert str(collapse(heads([[0.1, 1.0]]))) == "no"


def test_slopes_move_apart_per_layer_and_never_when_shared(tmp_path: Path) -> None:
    apart = "apart: from -0.090 (layer 3) to 0.210 (layer 0), first at step 80"
    learned = [slopes(write_run(tmp_path, label)) for label in ("SM+leaky, per layer", "SM+leaky, shared", "SM+G")]
    expected = [(True, apart), (False, "one shared slope, 0.110 at the end"), None]
    assert [of_run and (of_run.are_apart, of_run.text) for of_run in learned] == expected


def test_slope_layers_follow_the_activations(tmp_path: Path) -> None:
    labels = ("SM+G/leaky", "SM+G/leaky, last", "SM+leaky, per layer", "SM+leaky, shared", "SM+R")
    runs = [write_run(tmp_path, label) for label in labels]
    assert [slope_layers(run) for run in runs] == [[1, 3], [3], [0, 1, 2, 3], [], []]
    assert [fixed_slope(run) for run in runs] == [None, None, None, None, 0]
    assert fixed_slope(write_run(tmp_path, "SM+R", model={"activation": ["relu"] * 4})) == 0


@pytest.mark.parametrize(
    ("first", "final", "expected"),
    [
        ((0.25, 0.25), (0.05, -0.05), True),
        ((0.25, 0.25), (0.0, 0.051), False),
        ((1.0,), (-0.051,), False),
        ((0.01, 0.01), (0.002, -0.009), True),
        ((0.01, 0.01), (0.002, 0.01), False),
        ((0.25, 0.25), (0.0, math.nan), False),
    ],
)
def test_slopes_have_gone_to_zero_when_each_of_them_has(first: Any, final: Any, expected: bool) -> None:
    assert Slopes(first, final, are_apart=False, text="").gone_to_zero is expected


def test_final_heads_come_from_the_end_or_newest_probe(tmp_path: Path) -> None:
    ends = [final_heads(write_run(tmp_path, status, status=status)) for status in ("finished", "interrupted")]
    assert [end and end.step for end in ends] == [200, 100]


def test_no_mean_of_survivors() -> None:
    cell = summarise([30.0, math.nan, math.nan])
    assert math.isnan(cell.mean)
    assert cell.text() == "NaN (2/3)"
    assert summarise([30.0, 32.0]).text() == "31.00 +- 1.41"
    assert summarise([30.0]).text() == "30.00"
    assert summarise([]).text() == "-"
    assert summarise([1.07446e77]).text() == "1.1e+77"


def test_differences_are_paired_by_seed() -> None:
    shares = paired_difference({0: 11.0, 1: 22.0, 2: 5.0}, {0: 10.0, 1: 20.0, 9: 1.0}, relative=True)
    assert (shares.n, shares.mean, shares.low) == (2, pytest.approx(0.1), pytest.approx(0.1))
    absolute = paired_difference({0: 11.0, 1: 22.0}, {0: 10.0, 1: 20.0})
    assert (absolute.low, absolute.high) == pytest.approx((1.5 - 12.706 * 0.5, 1.5 + 12.706 * 0.5), abs=2e-4)
    single = paired_difference({0: 11.0}, {0: 10.0})
    assert (single.mean, math.isnan(single.low), math.isnan(single.high)) == (1.0, True, True)
    broken = paired_difference({0: 11.0, 1: math.nan}, {0: 10.0, 1: 10.0})
    assert (math.isnan(broken.mean), broken.nonfinite, broken.n) == (True, 1, 2)


def test_recipes_do_not_mix_unasked(tmp_path: Path) -> None:
    labels = ("SM+leaky, fixed", "SM", "SM+LN+R", "SM+LN+G", "SM+G")
    runs = [*(write_run(tmp_path, label) for label in labels), write_run(tmp_path, "SM+R", train={"precision": "bf16"})]
    message = r"train\.precision: bf16 in quick/sm-r-seed0, fp32 in quick/sm-leaky--fixed-seed0.*mix=true"
    with pytest.raises(ValueError, match=message):
        group_runs(runs)
    labels = ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R", "SM", "SM+leaky, fixed")  # the paper's first, in its order
    names = [f"{label} [precision={'bf16' if label == 'SM+R' else 'fp32'}]" for label in labels]
    assert [group.name for group in group_runs(runs, mix=True)] == names


def test_runs_on_another_corpus_are_no_seeds_of_one_recipe(tmp_path: Path) -> None:
    other = another_corpus("decaf" * 8)
    runs = [write_run(tmp_path, "SM+G"), write_run(tmp_path, "SM+G", seed=1, facts=other)]
    with pytest.raises(ValueError, match=r"corpus: c0ffeec0ffee in .*, decafdecafde in .*mix=true"):
        group_runs(runs)
    runs += [write_run(tmp_path, "SM+R", facts=other), write_run(tmp_path, "SM+R", seed=1, facts=other)]
    groups = {group.name: group for group in group_runs(runs, mix=True)}
    assert list(groups) == ["SM+G [corpus=c0ffeec0ffee]", "SM+G [corpus=decafdecafde]", "SM+R [corpus=decafdecafde]"]
    pairs = pairs_of(list(groups.values()))
    assert [pair.name for pair in pairs] == ["SM+R against SM+G [corpus=decafdecafde]"]


def test_names_say_tags_and_lengths_instead_of_corpora(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM+G"), write_run(tmp_path, "SM+R", tag="fast", train={"peak_learning_rate": 1e-2})]
    runs += [write_run(tmp_path, "SM+LN+G", data={"context": 64}, facts=another_corpus("decaf" * 8))]
    names = [group.name for group in group_runs(runs, mix=True)]
    assert names == ["SM+LN+G [context=64]", "SM+G [context=32]", "SM+R (fast)"]


def test_two_corpora_of_one_setting_have_different_names(tmp_path: Path) -> None:
    """Names are keys: two groups of one name would be drawn and counted as one."""
    runs = [write_run(tmp_path / name, "SM+G", facts=another_corpus(name * 8)) for name in "ab"]
    runs += [write_run(tmp_path / "long", "SM+G", data={"context": 64})]
    names = [group.name for group in group_runs(runs, mix=True)]
    assert len(set(names)) == 3
    assert "SM+G [corpus=aaaaaaaa, context=32]" in names


def test_an_unfinished_run_of_another_recipe_is_allowed(tmp_path: Path) -> None:
    finished = write_run(tmp_path, "SM+G", train={"peak_learning_rate": 1e-3})
    failed = write_run(tmp_path, "SM+G", study="failed", status="failed", train={"peak_learning_rate": 5e-4})
    groups = {group.name: (len(group.runs), len(group.unfinished)) for group in group_runs([finished, failed])}
    assert groups == {"SM+G": (1, 0), "SM+G [peak_learning_rate=0.0005]": (0, 1)}


def test_a_preset_replaces_its_settings_in_names(tmp_path: Path) -> None:
    rotary: dict[str, Any] = {"preset": "cpu-pythia", "model": {"position": "rotary", "residual": "parallel"}}
    fast: dict[str, Any] = {"study": "fast", "train": {"peak_learning_rate": 1e-2}}
    runs = [write_run(tmp_path, "SM+G", **more) for more in ({}, fast, rotary)]
    rate = runs[0].spec["train"]["peak_learning_rate"]
    settings = [("cpu", rate), ("cpu", 0.01), ("cpu-pythia", rate)]
    names = {group.name for group in group_runs(runs, mix=True)}
    assert names == {f"SM+G [preset={preset}, peak_learning_rate={value}]" for preset, value in settings}


def test_parts_say_how_their_recipes_differ(tmp_path: Path) -> None:
    rates = {"a": {"peak_learning_rate": 1e-2}, "b": {"peak_learning_rate": 1e-3}}
    labels = (("SM+R", "a"), ("SM+R", "b"), ("SM+G", "a"))
    runs = [write_run(tmp_path, label, tag=tag, train=rates[tag]) for label, tag in labels]
    parts = [(part.recipe, [group.name for group in part.groups]) for part in parts_of(runs, mix=True)]
    assert parts == [("peak_learning_rate=0.01", ["SM+G (a)", "SM+R (a)"]), ("peak_learning_rate=0.001", ["SM+R (b)"])]
    assert [part.recipe for part in parts_of(runs[1:2])] == [""]


def test_a_record_without_a_new_setting_has_its_default(tmp_path: Path) -> None:
    """As if `train.adam_beta2` had been added after the first run."""
    older, newer = write_run(tmp_path, "SM+G"), write_run(tmp_path, "SM+G", seed=1)
    del older.spec["train"]["adam_beta2"]
    (group,) = group_runs([older, newer])
    assert len(group.runs) == 2
    changed = write_run(tmp_path, "SM+R", train={"adam_beta2": 0.95})
    with pytest.raises(ValueError, match=r"train\.adam_beta2: 0\.95 in quick/sm-r-seed0, 0\.999 in quick/sm-g-seed0"):
        group_runs([older, changed])


def test_a_group_has_one_run_per_seed_and_data_order(tmp_path: Path) -> None:
    seeds = ((10, "finished"), (2, "diverged"), (3, "interrupted"), (4, "failed"))
    runs = [write_run(tmp_path, "SM+G", seed=seed, status=status) for seed, status in seeds]
    runs += [write_run(tmp_path, "SM+G", study="order", seed=10, data_seed=1)]
    runs += [write_run(tmp_path, "SM+G", study="repeated", seed=10)]
    (group,) = group_runs(runs)
    assert list(group.scores) == [(2, 0), (10, 0), (10, 1)]
    assert [run.seed for run in group.unfinished] == [3, 4]
    assert [run.spec["study"] for run in group.repeated] == ["repeated"]
    with pytest.raises(ValueError, match="no runs given"):
        group_runs([])


def test_a_seed_is_initial_weights_and_data_order(tmp_path: Path) -> None:
    """As with `data_seed: same`, beside a record whose data has another order."""
    seeds = ((100, 100), (101, 101), (100, 0))
    runs = [write_run(tmp_path / f"{s}-{o}", "SM+G", seed=s, data_seed=o, perplexity=20.0) for s, o in seeds]
    runs += [write_run(tmp_path, "SM+R", seed=seed, data_seed=seed, perplexity=21.0) for seed in (100, 101, 102)]
    (pair,) = pairs_of(group_runs(runs), [("SM+R", "SM+G")])
    assert pair.seeds == [(100, 100), (101, 101)]
    assert (pair.score().n, pair.score().mean) == (2, pytest.approx(0.05))


def with_own_rate(root: Path, label: str, rate: float, **more: Any) -> Run:
    across = ["train.peak_learning_rate"]
    return write_run(root, label, compare_across=across, train={"peak_learning_rate": rate}, **more)


def test_runs_that_declare_it_are_compared_across_rates(tmp_path: Path) -> None:
    runs = [with_own_rate(tmp_path, "SM+G", 1.4e-3, seed=seed) for seed in (0, 1)]
    runs += [with_own_rate(tmp_path, "SM+R", 2e-3, seed=seed) for seed in (0, 1)]
    (pair,) = all_pairs(group_runs(runs))
    assert (pair.name, len(pair.seeds)) == ("SM+R (lr 2e-3) against SM+G (lr 1.4e-3)", 2)
    older = write_run(tmp_path, "SM+LN+G", train={"peak_learning_rate": 2e-3})
    del older.spec["compare_across"]  # as in records from before there was such a key
    with pytest.raises(ValueError, match=r"rate: 0\.002 in quick/sm-ln-g-seed0, by variant in quick/sm-g-seed0"):
        group_runs([*runs, older])
    parts = [(part.recipe, [group.name for group in part.groups]) for part in parts_of([*runs, older], mix=True)]
    by_variant = ("peak_learning_rate=by variant", ["SM+G (lr 1.4e-3)", "SM+R (lr 2e-3)"])
    assert parts == [by_variant, ("peak_learning_rate=0.002", ["SM+LN+G"])]
    undeclared = write_run(tmp_path / "other", "SM+G", train={"peak_learning_rate": 2.8e-3})
    with pytest.raises(ValueError, match="mix=true"):
        group_runs([older, undeclared])


def test_seeds_of_one_variant_have_one_rate(tmp_path: Path) -> None:
    runs = [with_own_rate(tmp_path, "SM+G", rate, seed=seed) for seed, rate in ((0, 1.4e-3), (1, 2e-3))]
    with pytest.raises(ValueError, match=r"seed0 and quick/sm-g-seed1 are .*: 0\.0014} and {.*: 0\.002}: change"):
        group_runs(runs)
    tagged = with_own_rate(tmp_path, "SM+G", 2e-3, seed=1, tag="fast")
    assert [group.name for group in group_runs([runs[0], tagged])] == ["SM+G (fast) (lr 2e-3)", "SM+G (lr 1.4e-3)"]


OBSERVED_MAX_NATS = 3.87  # the highest published head; the paper's ranges are quarters of it
BINS = {"SM+LN+G": (6, 20, 106, 12), "SM+LN+R": (8, 24, 107, 5), "SM+G": (2, 26, 33, 83), "SM+R": (4, 29, 79, 32)}


@pytest.mark.parametrize("label", BINS)
def test_published_heatmaps_bin_as_stated(label: str) -> None:
    assert max(values.max() for values in published.heatmaps().values()) == OBSERVED_MAX_NATS
    counts = range_counts(published.heatmaps()[label], OBSERVED_MAX_NATS)
    assert counts.finite_R == BINS[label]
    assert [100 * share for share in counts.shares] == pytest.approx(published.RANGE_PERCENT[label], abs=2)


def test_layer_means_show_the_published_signature() -> None:
    expected = [3.16, 3.24, 3.23, 3.34, 3.50, 3.50, 3.32, 2.91, 1.81, 1.88, 1.96, 1.87]
    assert layer_means(published.heatmaps()["SM+G"]) == pytest.approx(expected, abs=0.006)


def test_only_gelu_without_layernorm_is_overloaded_in_the_paper() -> None:
    ceiling = causal_ceiling(published.HEATMAP_CONTEXT)
    verdicts = {
        label: overload(Heads(values, values[:, 0] * 0 + ceiling, 0, range(12))).holds
        for label, values in published.heatmaps().items()
    }
    assert verdicts == {"SM+LN+G": False, "SM+LN+R": False, "SM+G": True, "SM+R": False}


@pytest.mark.parametrize(
    ("position", "context", "model"),
    [("learned", 128, "GPT-2 125M, T=128"), ("rotary", 128, "Pythia-70M, T=128"), ("rotary", 256, "Pythia-70M, T=256")],
)
def test_a_run_stands_beside_the_published_model_of_its_shape(position: str, context: int, model: str) -> None:
    assert published.counterpart({"model": {"position": position}, "data": {"context": context}}) == model
