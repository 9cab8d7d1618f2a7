"""`normfree evaluate` and `normfree measure` on a run, at the door."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normfree import held_out_blocks, intervene, load_pretrained, read_run
from normfree.pretrained.load import corpus_of_run


def test_evaluating_a_run_gives_its_recorded_perplexity(trained, cache, tmp_path, run, output, monkeypatch) -> None:
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "empty"))
    out = output("evaluate", str(trained), f"cache_dir={cache}")
    recorded = read_run(trained).facts["final"]
    perplexity = f"perplexity     {recorded['perplexity']:.4f}"
    assert f"{perplexity} (over {recorded['tokens']} predicted tokens; run.json, in fp32" in out
    assert f"bits per byte  {recorded['bits_per_byte']:.4f} (over {recorded['bytes']} bytes" in out
    assert "context= cuts a text" in run("evaluate", str(trained), "context=8")[2]
    moved = shutil.copytree(trained, tmp_path / "moved")
    (moved / "run.json").write_text((moved / "run.json").read_text().replace("/held_out", "/nowhere"))
    assert perplexity in output("evaluate", str(moved), f"cache_dir={cache}")
    assert re.search(r"/nowhere' matches no file.*; give text=FILE", run("evaluate", str(moved))[2])
    other = shutil.copytree(trained, tmp_path / "other")
    (other / "run.json").write_text((other / "run.json").read_text().replace(read_run(trained).corpus, "0" * 64))
    assert "other has corpus 000000000000, and its" in run("evaluate", str(other), f"cache_dir={cache}")[2]


@pytest.mark.parametrize("family", ["vision", "encoder_decoder"], indirect=True)
def test_runs_of_other_families_are_evaluated_too(family: str, trained: Path, cache: Path, run, output) -> None:
    out = output("evaluate", str(trained), f"cache_dir={cache}")
    recorded = read_run(trained).facts["final"]
    unit = "images" if "accuracy" in recorded else "tokens"
    assert f"perplexity     {recorded['perplexity']:.4f} (over {recorded['tokens']} predicted {unit}" in out
    if family == "vision":
        assert f"accuracy       {100 * recorded['accuracy']:.2f} %" in out
    assert "no causal language-model head" in run("evaluate", str(trained), "tasks=keyword")[2]


@pytest.fixture
def held_out(trained: Path, cache: Path) -> tuple[Any, torch.Tensor, Any]:
    """The model of the run, its held-out blocks and the documents of their tokens."""
    documents = corpus_of_run(read_run(trained), cache).held_out_documents()
    return load_pretrained(str(trained))[0], held_out_blocks(str(trained), cache=cache), documents


def test_evaluate_prints_what_changing_heads_does(trained: Path, cache: Path, held_out, output) -> None:
    words = ["evaluate", str(trained), f"cache_dir={cache}", "heads=[[0,1],[1,0]]"]
    model, blocks, documents = held_out
    plain = per_token_nats(model, blocks)
    for how, description in (("average", "averaged"), ("zero", "silenced"), ("0.5", "times 0.5")):
        out = output(*words, f"how={how}")
        assert f"\nheads          layer 0 head 1, layer 1 head 0 {description}\n" in out
        before, after = map(float, re.findall(r"cross-entropy  ([\d.]+) nats", out))
        text = r"difference     ([+-][\d.]+) nats per token \(standard error ([\d.]+) over (\d+) documents\)"
        ((difference, error, parts),) = re.findall(text, out)
        with intervene(model, [(0, 1), (1, 0)], float(how) if how == "0.5" else how):
            changed = per_token_nats(model, blocks)
        assert after == pytest.approx(changed.mean(), abs=1e-4)
        assert before == pytest.approx(plain.mean(), abs=1e-4)
        assert float(difference) == pytest.approx((changed - plain).mean(), abs=1e-4)
        assert float(error) == pytest.approx(error_over_documents(changed - plain, documents), rel=0.01, abs=1e-6)
        assert int(parts) == len(np.unique(documents))


def per_token_nats(model, blocks) -> np.ndarray:
    """(N, T - 1) cross-entropies by hand."""
    with torch.no_grad():
        logits = model(input_ids=blocks).logits[:, :-1].double()
    return -logits.log_softmax(-1).gather(-1, blocks[:, 1:, None])[..., 0].numpy()


def error_over_documents(values, documents) -> float:
    """Of a mean over tokens that are drawn by document: the error of a ratio of sums, as textbooks have it."""
    parts = [documents[:, 1:] == number for number in np.unique(documents[:, 1:])]
    sums = np.array([(values[is_in].sum(), is_in.sum()) for is_in in parts])
    deviations = sums[:, 0] - values.mean() * sums[:, 1]
    return np.sqrt(len(sums)) * deviations.std(ddof=1) / values.size


def test_two_runs_are_compared_over_documents(trained: Path, cache: Path, held_out, run, output, tmp_path) -> None:
    model, blocks, documents = held_out
    ours = per_token_nats(model, blocks)
    other = shutil.copytree(trained, tmp_path / "other")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.7)
    model.save_pretrained(other / "model")
    difference = ours - per_token_nats(model, blocks)
    out = output("evaluate", str(trained), f"cache_dir={cache}", f"against={other}")
    text = r"difference     ([+-][\d.]+) nats per token \(95 % \[(.*), (.*)\], bootstrap over (\d+)"
    mean, low, high, parts = map(float, *re.findall(text, out))
    assert mean == pytest.approx(difference.mean(), abs=1e-4)
    assert low < difference.mean() < high
    assert high - low == pytest.approx(3.92 * error_over_documents(difference, documents), rel=0.3)
    assert parts == len(np.unique(documents))
    alone, first = run("evaluate", str(trained), f"cache_dir={cache}")[1], out[: out.index("\nagainst")]
    assert alone == first
    text = (other / "run.json").read_text()
    (other / "run.json").write_text(text.replace(read_run(trained).corpus, "0" * 64))
    for words, message in (
        ([f"against={other}"], "has 000000000000: give runs of one corpus"),
        ([f"against={trained}", "heads=[[0,1]]"], "without text= or heads="),
        (["against=nowhere"], "nowhere does not exist; give the folder of one run"),
    ):
        assert message in run("evaluate", str(trained), f"cache_dir={cache}", *words)[2]


def test_a_part_of_the_blocks_is_evaluated_on_request(trained: Path, cache: Path, held_out, run, output) -> None:
    model, blocks, _ = held_out
    ends = per_token_nats(model, blocks[[0, len(blocks) - 1]])
    out = output("evaluate", str(trained), f"cache_dir={cache}", "sequences=2")
    assert float(re.findall(r"cross-entropy  ([\d.]+) nats", out)[0]) == pytest.approx(ends.mean(), abs=1e-4)
    text = "".join(corpus_of_run(read_run(trained), cache).tokenizer().decode(ids[1:]) for ids in blocks[[0, -1]])
    assert f"(over {len(text.encode())} bytes" in out
    assert "it should be greater than 0" in run("evaluate", str(trained), f"cache_dir={cache}", "sequences=0")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["heads=[[0,1],[9,0]]"], "layer 9 has no attention here; allowed: 0, 1"),
        (["heads=[0,1]"], "heads='[0,1]'; give one or more pairs, e.g. heads=[[0,3],[1,2]]"),
        (["heads=[[0,1.5]]"], "give one or more pairs"),
        (["heads=[[0,1]]", "how=mean"], "how='mean'; allowed: 'average', 'zero' or a finite number"),
        (["how=zero"], "how= needs the heads to change, e.g. heads=[[0,3],[1,2]]"),
    ],
)
def test_wrong_heads_of_evaluate_are_named_in_a_line(words, message, trained: Path, cache: Path, run) -> None:
    status, out, err = run("evaluate", str(trained), f"cache_dir={cache}", *words)
    assert (status != 0, out) == (True, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["evaluate", "measure"])
def test_bf16_without_bf16_units_says_how(command, trained, tmp_path, output, caplog, monkeypatch) -> None:
    monkeypatch.setattr("normfree.training.precision.has_bf16_units", lambda: False)
    (tmp_path / "text.py").write_text("def f(x):\n    return x\n" * 5)
    words = [command, str(trained), f"text={tmp_path / 'text.py'}", "dtype=bf16", "device=cpu"]
    out = output(*words, f"output={tmp_path / 'page'}" if command == "measure" else "stride=4")
    if command == "evaluate":
        assert f"text           {tmp_path / 'text.py'}\nperplexity     " in out
    assert "no bf16 units" in caplog.text


def test_a_run_is_measured_on_its_own_held_out_blocks(trained: Path, cache: Path, tmp_path: Path, run, output) -> None:
    words = ["measure", str(trained), f"output={tmp_path / 'heads'}", f"cache_dir={cache}"]
    recorded = read_run(trained)
    output(*words, f"sequences={recorded.spec['probe']['final_sequences']}")
    measured = read_run(tmp_path / "heads")
    assert measured.facts["measurement"]["text"] == "the run's own held-out blocks"
    for name in ("entropy_nats", "first_token_mass", "distance_tokens"):
        assert np.allclose(measured.last("final", name), recorded.last("final", name), atol=1e-5)
    assert "context= cuts a text" in run(*words, "context=8")[2]
    assert "sequences='0': it should be greater than 0" in run(*words, "sequences=0")[2]
