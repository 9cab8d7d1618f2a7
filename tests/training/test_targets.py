"""Runs of encoder-decoders: what they record, save and begin with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration, set_seed

from normfree.analysis.groups import group_runs
from normfree.data import prepare
from normfree.model.conversion import convert
from normfree.pretrained.load import corpus_of_run
from normfree.report.figures import heatmaps
from normfree.store.quantities import QUANTITIES
from normfree.store.runs import read_run
from normfree.training.trainer import BlockOrder
from tests.training.runs import weights

pytestmark = pytest.mark.parametrize("family", ["encoder_decoder"], indirect=True)


@pytest.fixture
def model(trained: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(trained / "model")


def test_the_score_is_the_perplexity_of_targets(trained: Path, model: Any, cache: Path, tiny_spec) -> None:
    run, corpus = read_run(trained), prepare(tiny_spec().data, cache=cache, progress=False)
    held_out = model.batch_of(torch.from_numpy(corpus.held_out_ids()))
    with torch.no_grad():
        logits_NTV = model(**held_out).logits.double()
    nats = torch.nn.functional.cross_entropy(logits_NTV.mT, held_out["labels"])
    assert run.perplexity == pytest.approx(nats.exp().item(), rel=1e-5)
    assert run.facts["final"]["tokens"] == held_out["labels"].numel()
    trained_on = model.batch_of(torch.tensor(corpus.train["input_ids"][:]))["labels"]
    counts_V = np.bincount(trained_on.flatten(), minlength=model.config.vocab_size) + 1
    unigram = -np.log(counts_V / counts_V.sum())[held_out["labels"]].mean()
    facts = run.facts["corpus"]
    assert facts["unigram_perplexity"] == pytest.approx(np.exp(unigram))
    assert (facts["masked_tokens"], facts["spans"], facts["ngram_perplexity"]) == (2, 1, {})
    assert facts["fingerprint"] == corpus.fingerprint


def test_layers_are_recorded_by_group(trained: Path) -> None:
    run = read_run(trained)
    groups = [f"{group} {layer}" for group in ("encoder", "decoder", "cross") for layer in (0, 1)]
    assert run.layer_numbers("entropy_nats", 6) == groups
    assert np.shape(run.last("final", "entropy_nats")) == (6, 2)
    ceilings = run.last("final", "ceiling_nats")  # 15 tokens of the source, 4 of the target
    assert ceilings == pytest.approx(np.repeat([np.log(15), np.log([1, 2, 3, 4]).mean(), np.log(15)], 2))
    figure = heatmaps(group_runs([run]), QUANTITIES["entropy_nats"])
    assert "on one colour scale as shares of each layer's ceiling" in figure.caption


def test_the_saved_tokenizer_knows_the_sentinels(trained: Path, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    source = tokenizer("import <span_0>", return_tensors="pt").input_ids
    assert source[0, -1] == model.config.vocab_size - 2
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.config.decoder_start_token_id == 301
    assert tokenizer.decode(model.generate(source, max_new_tokens=3)[0]).startswith("<span_1>")


def test_a_run_begins_with_another_or_a_t5(train_tiny, trained: Path, tmp_path: Path) -> None:
    again = train_tiny(f"start=run:{trained}", "tag=again", "train.steps=2")
    first = read_run(trained)
    assert again.series("validation", "loss")[0][1] == pytest.approx(first.last("validation", "loss"), abs=1e-6)
    words = (f"start=run:{trained}", "data=files", f"data.paths=['{Path(__file__).parent}/*.py']")
    assert train_tiny(*words, "tag=other", "data.context=16", "train.steps=1").status == "finished"
    with pytest.raises(ValueError, match="tokens with its sentinels, and"):  # its sentinels would be words
        train_tiny(*words, "tag=longer", "data.context=256", "train.steps=1")
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 310}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, initializer_factor=0.3))
    t5.save_pretrained(tmp_path / "t5")
    prepared = AutoTokenizer.from_pretrained(trained / "model")
    prepared.save_pretrained(tmp_path / "t5")
    run = train_tiny(f"start=model:{tmp_path / 't5'}", "variant=custom", "train.frozen=['*.layers.*']", "train.steps=1")
    ours, theirs = weights(run.folder), convert(t5).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items() if ".layers." in name)


def test_a_run_writes_docstrings(run, tiny: list[str], cache: Path, tmp_path: Path) -> None:
    words = ("variant=sm-r", "data.packing=docstring", "data.context=32", "train.micro_batch_sequences=2")
    code, _, error = run("train", *tiny, *words, "train.steps=3", f"cache_dir={cache}", f"runs_dir={tmp_path}")
    assert code == 0, error
    folder = tmp_path / "single" / "sm-r-seed0"
    recorded, corpus = read_run(folder), corpus_of_run(read_run(folder), cache)
    trained = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    held_out = losses_of(trained, corpus.held_out_ids())
    assert recorded.perplexity == pytest.approx(np.exp(np.mean(held_out)), rel=1e-5)
    assert recorded.facts["final"]["tokens"] == len(held_out) == recorded.facts["corpus"]["validation_target_tokens"]
    set_seed(0)
    first = [*BlockOrder(blocks=len(corpus.train), sequences=8, seed=0)]
    losses = losses_of(type(trained)(trained.config), np.array(corpus.train["input_ids"])[first])
    assert recorded.series("train", "loss")[0][1] == pytest.approx(np.mean(losses), rel=1e-5)
    assert "first lines of docstrings" in (folder / "model" / "README.md").read_text()
    assert recorded.family.corpus.format(**recorded.facts["corpus"]).startswith("source files, functions in rows of 32")


def losses_of(model: Any, rows_NT: np.ndarray) -> list[float]:
    """The loss of each token of the targets of rows of 32 tokens, a row at a time and without padding."""
    losses, end = [], model.config.eos_token_id
    for row in rows_NT.tolist():
        source, target = (part[: part.index(end) + 1] for part in (row[:24], row[24:]))
        with torch.no_grad():
            logits_TV = model.eval()(
                torch.tensor([source]), decoder_input_ids=torch.tensor([[end, *target[:-1]]])
            ).logits
        losses += torch.nn.functional.cross_entropy(logits_TV[0], torch.tensor(target), reduction="none").tolist()
    return losses
