"""Runs that begin with the weights of another run or of a saved model, and lose their norms."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from normfree import Run, compose_run, find_runs, train
from normfree.cli.main import main
from normfree.model.conversion import convert
from tests.training.runs import check_equal_runs, killed_in_step, weights

SELDOM = ("train.evaluate_every=50", "train.checkpoint_every=50", "probe.every_steps=50", "train.log_every=10")
CONTROL = ("train.steps=100", "tag=cut", *SELDOM)
REMOVE = ("variant=sm-fake-g", "model.fake_start_step=20", "model.fake_gap_steps=10", *CONTROL)


@pytest.fixture
def trained(train_tiny: Callable[..., Run]) -> Run:
    return train_tiny("variant=sm-ln-g")


def test_a_start_without_steps_keeps_the_numbers(train_tiny: Callable[..., Run], trained: Run) -> None:
    run = train_tiny(f"start=run:{trained.folder}", "variant=sm-ln-g", "tag=on", "train.steps=2")
    assert run.series("validation", "loss")[0][1] == pytest.approx(trained.last("validation", "loss"), abs=1e-6)
    first, last = run.series("probe", "entropy_nats")[0][1], trained.last("probe", "entropy_nats")
    np.testing.assert_allclose(first, last, atol=1e-6)
    assert (run.spec["start_name"], run.spec["preset"]) == ("single/sm-ln-g", trained.spec["preset"])
    card = (run.folder / "model" / "README.md").read_text()
    assert "trained it from the weights of single/sm-ln-g," in card


@pytest.mark.parametrize("family", ["vision"], indirect=True)
def test_a_run_begins_with_a_vit_of_transformers(train_tiny: Callable[..., Run], tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1)
    vit = transformers.ViTForImageClassification(config)  # of two other classes
    vit.save_pretrained(tmp_path / "vit")
    words = "variant=custom", "train.frozen=['model.*']", "train.steps=1"
    first = train_tiny(f"start=model:{tmp_path / 'vit'}", *words)
    again = train_tiny(f"start=run:{first.folder}", *words, "tag=again")
    converted = convert(vit).state_dict()
    for run in (first, again):
        ours = weights(run.folder)
        assert ours["classifier.weight"].shape == (4, 32)
        assert all(torch.equal(ours[name], value) for name, value in converted.items() if name.startswith("model."))
    assert again.series("validation", "loss")[0][1] == pytest.approx(first.last("validation", "loss"), abs=1e-6)


def test_a_shorter_context_cuts_what_is_learned_by_position(train_tiny: Callable[..., Run]) -> None:
    first = train_tiny("variant=sm-temps-g", "tag=long", "train.steps=2")
    start = f"start=run:{first.folder}"
    run = train_tiny(start, "variant=sm-temps-g", "tag=short", "data.context=8", "train.frozen=['*temperature*']")
    long, short = (weights(each.folder)["model.layers.1.attention.temperature.value"] for each in (first, run))
    assert torch.equal(short, long.view(2, 16)[:, :8].flatten())
    with pytest.raises(ValueError, match=r"data\.context=32 is beyond the 16 learned positions"):
        train_tiny(start, "variant=sm-temps-g", "tag=longer", "data.context=32")


def test_norms_leave_a_trained_model(train_tiny: Callable[..., Run], trained: Run) -> None:
    start = f"start=run:{trained.folder}"
    control, run = train_tiny(start, "variant=sm-ln-g", *CONTROL), train_tiny(start, *REMOVE)
    assert run.facts["folded"]["largest_logit_difference"] < 1e-5
    saved = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert (saved.config.norm, saved.config.bias) == ("none", "all")
    assert not any("attention_norm" in name for name in saved.state_dict())
    assert run.perplexity < 1.5 * control.perplexity
    # A folded run is the start of another one, as a model without norms.
    again = train_tiny(f"start=run:{run.folder}", "variant=sm-g", "tag=again", "train.steps=2")
    assert again.series("validation", "loss")[0][1] == pytest.approx(run.last("validation", "loss"), abs=1e-4)


def test_a_kill_within_the_removal_resumes_to_the_bit(train_tiny: Callable[..., Run], trained: Run) -> None:
    words = (f"start=run:{trained.folder}", *REMOVE, "train.checkpoint_every=10")
    whole = train_tiny(*words)
    with killed_in_step(37):
        train_tiny(*words, runs="killed")
    check_equal_runs(train_tiny(*words, runs="killed").folder, whole.folder)


def test_a_gpt2_is_trained_on(train_tiny: Callable[..., Run], trained: Run, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained.folder / "model")
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    run = train_tiny(f"start=model:{tmp_path / 'gpt2'}", "variant=custom", "train.steps=2", "train.frozen=['*embed*']")
    ours = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert torch.equal(ours.model.embed_tokens.weight, theirs.transformer.wte.weight)
    assert not torch.equal(ours.model.layers[0].feed_forward.input.weight, theirs.transformer.h[0].mlp.c_fc.weight.t())
    assert run.spec["start_name"] == str(tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["start=elsewhere"], "allowed: random, run:FOLDER, model:NAME"),
        (["start=run:nowhere"], "is not a run folder"),
        (["start=run:{run}", "variant=sm-ln-r"], "model.activation="),
        (["start=run:{run}", "variant=sm-g"], "norm"),
        (["start=run:{run}", "train.frozen=['*wte*']", "tag=x"], "names no parameter"),
        (["start=run:{run}", *REMOVE[:3], "train.steps=50", "tag=x"], "this run has 50 steps"),
    ],
)
def test_starts_that_cannot_be(train_tiny: Callable[..., Run], trained: Run, words: list[str], message: str) -> None:
    words = [word.format(run=trained.folder) for word in words]
    with pytest.raises(ValueError, match=message):
        train_tiny("variant=sm-ln-g", *words)


def test_changed_weights_are_refused(train_tiny: Callable[..., Run], trained: Run, cache: Path) -> None:
    spec = compose_run([f"start=run:{trained.folder}", "tag=late", "train.steps=2"]).spec
    other = train_tiny("variant=sm-ln-g", "seed=1")
    (other.folder / "model" / "model.safetensors").replace(trained.folder / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="other weights than when this run began"):
        train(spec, runs_dir=trained.folder.parents[1], cache=cache, progress=False)


def test_the_control_runs_beside_a_removal(trained: Run, cache: Path, tiny: list[str], tmp_path: Path) -> None:
    words = [word for word in tiny if not word.startswith("train.steps")]
    places = [f"runs_dir={tmp_path / 'both'}", f"cache_dir={cache}"]
    assert main(["train", *words, f"start=run:{trained.folder}", *REMOVE, *places]) == 0
    runs = {run.name: run.facts["steps"] for run in find_runs([tmp_path / "both"])}
    assert runs == {"sm-fake-g-cut-seed0": 100, "sm-ln-g-cut-seed0": 100}


def test_the_variance_of_sigma_falls_with_its_weight(train_tiny: Callable[..., Run], trained: Run) -> None:
    def variance(run: Run) -> float:
        model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
        ids = torch.arange(160).view(10, 16) % 300
        return model(ids, sigma_variance=True).sigma_variance.item()

    words = (f"start=run:{trained.folder}", "variant=sm-ln-g", "train.steps=40", *SELDOM)
    plain, penalised = train_tiny(*words, "tag=plain"), train_tiny(*words, "train.sigma_weight=1", "tag=whole")
    cut = train_tiny(*words, "train.sigma_weight=1", "train.micro_batch_sequences=1", "tag=cut")
    assert variance(penalised) < 0.7 * variance(plain)
    assert variance(cut) == pytest.approx(variance(penalised), rel=1e-3)
    assert penalised.series("train", "loss")[0][1] == pytest.approx(plain.series("train", "loss")[0][1], abs=1e-6)
