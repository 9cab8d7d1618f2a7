"""Scores equal known probabilities; their table equals numpy's numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from normfree.analysis.groups import group_runs
from normfree.analysis.seeds import student_t
from normfree.data.tokenizer import train_tokenizer
from normfree.measures.text_perplexity import encode
from normfree.report.sections import sections_of
from normfree.report.tables.tasks import ratio, task_table, tasks_table
from normfree.store.tasks import read_tasks, write_tasks
from normfree.tasks.pairs import Pair
from normfree.tasks.score import log_likelihoods, score_pairs, score_solutions, shared_window, unigram, untrained_copy
from tests.small_model import small_model
from tests.synthetic import write_run

LETTERS = "abcdefgh\n "
LOG_VV = np.log(np.random.default_rng(0).dirichlet(np.ones(len(LETTERS)), size=len(LETTERS)))


def bigram(rows: Any) -> list[np.ndarray]:
    """P(next | last) is a row of a known matrix: no more context than one token."""
    return [LOG_VV[row[:-1], row[1:]] for row in rows]


def letters(text: str) -> tuple[list[int], list[int]]:
    return [LETTERS.index(letter) for letter in text], list(range(1, len(text) + 1))


def test_a_long_row_is_scored_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = log_likelihoods(small_model(), [list(range(30)), [3, 1, 2]])
    monkeypatch.setattr("normfree.measures.perplexity._LARGEST_BLOCK", 61 * 4)
    monkeypatch.setattr("normfree.tasks.score.LARGEST_LOGITS", 61)
    blocks = log_likelihoods(small_model(), [list(range(30)), [3, 1, 2]])
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(whole, blocks, strict=True))


def test_windows_lose_the_same_tokens_at_both_ends() -> None:
    before, after = list(range(100, 140)), list(range(200, 240))
    good, bad = [*before, 1, *after], [*before, 2, 3, *after]
    assert shared_window(good, bad, 82) == (good, bad)
    for room in (81, 60, 40, 20, 8):
        window = shared_window(good, bad, room)
        assert max(map(len, window)) == room
        (start, end) = (window[0].index(1), window[0][::-1].index(1))
        assert window[0] == [*before[40 - start :], 1, *after[:end]]
        assert window[1] == [*before[40 - start :], 2, 3, *after[:end]]
        assert min(start, end) >= room // 4
    assert shared_window([*before, *range(9), *after], [*before, 9, *after], 8) is None
    assert shared_window([1, 2, 3], [2, 2, 3], 8) is None  # nothing predicts the first token


def test_margins_of_a_window_are_those_of_the_texts() -> None:
    good, bad = "ab" * 20 + "c" + "gh" * 20, "ab" * 20 + "d" + "gh" * 20
    pairs = [Pair(good, bad, "", ""), Pair(bad, good, "", "")]
    scorers = {"model": bigram}
    whole, cut = (score_pairs(pairs, letters, scorers, room)["values"]["model"] for room in (100, 9))
    assert np.allclose(whole, cut, atol=1e-12)
    assert math.isclose(whole[0], -whole[1])
    with pytest.raises(ValueError, match="no pair fits 4 tokens"):
        score_pairs([Pair("a" + "b" * 9, "a" + "c" * 9, "", "")] * 2, letters, scorers, 4)


def test_a_pair_too_long_takes_its_mirror_with_it() -> None:
    long, short = Pair("a" + "b" * 9 + "a", "a" + "c" * 9 + "a", "", ""), Pair("aba", "aca", "", "")
    scorers = {"unigram": unigram(np.arange(len(LETTERS)))}
    record = score_pairs([short, long, short, short], letters, scorers, 8)
    assert record["left_out"] == 2
    assert len(record["values"]["unigram"]) == 2


def test_a_unigram_has_add_one_smoothed_frequencies() -> None:
    (scores,) = unigram(np.array([0, 1, 3]))([[2, 0, 1, 2]])
    assert np.allclose(scores, np.log([1 / 7, 2 / 7, 4 / 7]))


@pytest.mark.parametrize("room", [100, 10, 4])
def test_bits_of_solutions_do_not_depend_on_windows(room: int) -> None:
    problems = [("abc\n", "  gh\n  ab\n"), ("h", "a"), ("ab" * 20, "ba" * 30)]
    record = score_solutions(problems, letters, {"model": bigram}, room)
    expected = [-bigram([letters(p + s)[0]])[0][len(p) - 1 :].sum() / math.log(2) for p, s in problems]
    assert np.allclose(record["values"]["model"], expected, atol=1e-10)
    assert record["bytes"] == [10, 1, 60]


def test_a_token_over_the_end_of_a_prompt_counts_whole() -> None:
    tokenizer = train_tokenizer(["def f():\n    return é\n" * 9], 270)
    model = small_model(vocab_size=270, max_position_embeddings=64)
    prompt, solution = "def f():\n", "    return é\n"

    def encoded(text: str) -> tuple[list[int], list[int]]:
        encoding, _, _ = encode(model, tokenizer, text, 64, None)
        return encoding["input_ids"], [end for _, end in encoding["offset_mapping"]]

    ids, ends = encoded(prompt + solution)
    assert len(prompt) not in ends  # "\n   " is one token
    record = score_solutions([(prompt, solution)], encoded, {"model": lambda rows: log_likelihoods(model, rows)}, 64)
    first = next(place for place, end in enumerate(ends) if end > len(prompt))
    assert record["bytes"] == [len((prompt + solution).encode()) - len(tokenizer.decode(ids[:first]).encode())]
    assert record["bytes"] == [1 + len(solution.encode())]
    (scores,) = log_likelihoods(model, [ids])
    assert math.isclose(record["values"]["model"][0], -scores[first - 1 :].sum() / math.log(2))


def test_an_untrained_copy_has_other_weights_from_its_seed() -> None:
    model, state = small_model(), torch.get_rng_state()
    first, again, other = (untrained_copy(model, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.training
    weights = [m.state_dict()["model.embed_tokens.weight"] for m in (model, first, again, other)]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])


def record(model: Any, untrained: Any, items: str = "a", **more: Any) -> dict[str, Any]:
    values = {"model": list(model), "untrained": list(untrained)}
    return {"unit": "nats", "items_sha256": items, "values": values, **more}


def only_row(*records: dict[str, Any]) -> dict[str, str]:
    table = tasks_table({"SM+R": [{"name": of_seed} for of_seed in records]})
    return dict(zip(table.titles, table.rows[0], strict=True))


def test_scores_have_the_standard_error_of_mirrored_twos() -> None:
    random = np.random.default_rng(0)
    model, untrained = random.normal(0.5, 1, 200), random.normal(0, 1, 200)
    right, control = (100.0 * (margins > 0).reshape(-1, 2).mean(axis=1) for margins in (model, untrained))
    row = only_row(record(model, untrained))
    assert row["Score"] == f"{right.mean():.1f} +- {right.std(ddof=1) / 10:.1f}"
    difference = right - control
    mean, reach = difference.mean(), 1.96 * difference.std(ddof=1) / 10
    assert row["Less untrained"] == f"{mean:+.1f} ({mean - reach:+.1f} to {mean + reach:+.1f})"
    margins = model.reshape(-1, 2).mean(axis=1)
    assert row["Margin (nats)"] == f"{margins.mean():.3f} +- {margins.std(ddof=1) / 10:.3f}"
    both_ways = 100.0 * (margins > 0)
    assert row["Both ways (%)"] == f"{both_ways.mean():.1f} +- {both_ways.std(ddof=1) / 10:.1f}"
    assert (row["Unigram"], row["Less unigram"], row["Items"], row["Seeds"]) == ("-", "-", "200", "1")


def test_a_ratio_has_the_error_of_its_jackknife() -> None:
    random = np.random.default_rng(1)
    sizes = random.integers(20, 200, 164).astype(float)
    numbers = sizes * random.normal(2.0, 0.4, 164)
    value, error = ratio(numbers, sizes)
    assert math.isclose(value, numbers.sum() / sizes.sum())
    without = (numbers.sum() - numbers) / (sizes.sum() - sizes)
    jackknife = math.sqrt(163 / 164 * ((without - without.mean()) ** 2).sum())
    assert abs(error / jackknife - 1) < 0.02


def test_seeds_are_paired_and_have_a_student_interval() -> None:
    records = [record([1, 1, 1, -1], [1, -1, 1, -1]), record([1, 1, 1, 1], [1, -1, -1, -1])]
    row = only_row(*records)
    assert row["Score"] == f"87.5 +- {np.std([75, 100], ddof=1):.1f}"
    reach = student_t(1) * np.std([25, 75], ddof=1) / math.sqrt(2)
    assert row["Less untrained"] == f"+50.0 ({50 - reach:+.1f} to {50 + reach:+.1f})"
    assert row["Seeds"] == "2"


def test_a_tie_is_half_right_and_nan_no_number() -> None:
    assert only_row(record([0, 0, 0, 0], [1, 1, 1, 1]))["Score"] == "50.0 +- 0.0"
    row = only_row(record([math.nan, 1, 1, 1], [1, 1, 1, 1]))
    assert (row["Score"], row["Less untrained"], row["Margin (nats)"]) == ("NaN", "NaN", "NaN")
    assert only_row(record([math.nan, 1], [1, 1]), record([1, 1], [1, 1]))["Score"] == "NaN (1/2)"


def test_bits_per_byte_are_sums_over_sums() -> None:
    row = only_row(record([10, 30], [20, 60], unit="bits", bytes=[10, 20]))
    assert row["Measured"] == "bits per byte"
    assert row["Score"].startswith("1.333 +-")
    assert row["Less untrained"].startswith("-1.333 (")
    assert row["Margin (nats)"] == "-"


def test_right_labels_are_shares_of_all_labels() -> None:
    labels = {"model": [3, 8], "majority": [2, 4], "unigram": [4, 4]}
    row = only_row({"unit": "right", "items_sha256": "a", "values": labels, "sizes": [4, 10]})
    assert (row["Measured"], row["Items"], row["Margin (nats)"]) == ("accuracy (%)", "14", "-")
    shares = [row[name].split(" ")[0] for name in ("Score", "Majority", "Unigram", "Less majority")]
    assert shares == ["78.6", "42.9", "57.1", "+35.7"]


def test_the_report_shows_recorded_tasks(tmp_path) -> None:
    runs = [write_run(tmp_path / "runs", label, seed=seed) for label in ("SM+R", "SM+G") for seed in (0, 1)]
    assert not task_table(group_runs(runs)).rows
    for run in runs[:3]:
        write_tasks(run.folder, {"name": record([1, math.nan, 1, 1], [1, -1, 1, 1], items=run.label)})
        write_tasks(run.folder, {"keyword": record([1, 1], [1, -1])})
    assert math.isnan(read_tasks(runs[0].folder)["name"]["values"]["model"][1])
    table = task_table(group_runs(runs))
    assert [(row[0], row[1], row[-1]) for row in table.rows] == [
        (label, task, seeds) for label, seeds in (("SM+G", "1"), ("SM+R", "2")) for task in ("name", "keyword")
    ]
    assert any("Not the same items in all rows: name." in note for note in table.notes)
    (section,) = (section for section in sections_of(group_runs(runs)) if section.name == "tasks")
    assert [shown.rows for shown in section.contents(group_runs(runs))[1]] == [
        [row[:5] + row[7:8] + row[10:] for row in table.rows]  # no other controls on record, so no columns of dashes
    ]
    content = bytearray((runs[0].folder / "tasks.json.gz").read_bytes())
    content[len(content) // 2] ^= 1
    (runs[0].folder / "tasks.json.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"tasks.json.gz is not readable as JSON: remove it and evaluate again"):
        task_table(group_runs(runs))
