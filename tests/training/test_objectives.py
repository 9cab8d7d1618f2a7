"""Objectives, optimisers and state that changes while training: exact however a step is cut, and resumable."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from normfree import NormFreeConfig, Run
from normfree.training.objectives import EntropyBand, EntropyTarget, build_objective, read_profile
from normfree.training.optimizers import MuonWithAdamW, parameter_groups
from normfree.training.study import run_study
from tests.small_model import small_model
from tests.training.runs import act_in, losses

CEILING = math.lgamma(17) / 16
TARGET = ["train.objective=entropy_target", "train.entropy_weight=0.5", "train.entropy_share=0.5"]
BAND = ["train.objective=entropy_band", "train.entropy_weight=0.5"]
TAPER = ["model.taper_start_step=1", "model.taper_end_step=5"]
STATES = {
    "plain": ["variant=sm-r"],
    "target": ["variant=sm-r", *TARGET],
    "band": ["variant=sm-r", *BAND],
    "taper": ["variant=sm-taper-r", *TAPER],
    "spectral": ["variant=sm-sn-r"],
    "muon": ["variant=sm-r", "train.optimizer=muon"],
}


@pytest.mark.parametrize("words", STATES.values(), ids=STATES)
def test_a_step_in_parts_gives_the_same_numbers(train_tiny, words):
    whole = train_tiny(*words, "train.micro_batch_sequences=8", runs="whole")
    parts = train_tiny(*words, "train.micro_batch_sequences=2", runs="parts")
    recomputed = train_tiny(*words, "train.gradient_checkpointing=true", runs="recomputed")
    for other in (parts, recomputed):
        assert losses(other) == pytest.approx(losses(whole), rel=2e-6)
        assert other.perplexity == pytest.approx(whole.perplexity, rel=2e-6)


@pytest.mark.parametrize("name", [name for name in STATES if name != "plain"])
def test_a_resumed_run_is_the_same_to_the_bit(train_tiny, name):
    words = STATES[name]
    run = train_tiny(*words)
    before = losses(run), run.perplexity, run.last("final", "entropy_nats")
    (run.folder / "run.json").unlink()
    shutil.rmtree(run.folder / "checkpoints" / "checkpoint-6")
    again = train_tiny(*words)
    assert again.facts["sessions"][0]["from_step"] == 4
    assert (losses(again), again.perplexity, again.last("final", "entropy_nats")) == before


def test_a_skipped_first_step_can_be_saved(train_tiny, monkeypatch):
    def spoil(trainer):
        if trainer.state.global_step == 0:
            next(trainer.network.parameters()).grad.fill_(torch.nan)

    act_in("_is_finite", spoil, monkeypatch)
    run = train_tiny(*TARGET, "train.on_nonfinite=skip:1", "train.checkpoint_every=1", "train.checkpoints_kept=9")
    (run.folder / "run.json").unlink()
    for step in range(2, 7):
        shutil.rmtree(run.folder / "checkpoints" / f"checkpoint-{step}")
    again = train_tiny(*TARGET, "train.on_nonfinite=skip:1", "train.checkpoint_every=1", "train.checkpoints_kept=9")
    assert (again.facts["sessions"][0]["from_step"], again.perplexity) == (1, run.perplexity)


def test_weight_zero_is_the_plain_objective_to_the_bit(train_tiny):
    plain = train_tiny()
    recorded = train_tiny(*TARGET, "train.entropy_weight=0", runs="recorded")
    assert losses(recorded) == losses(plain)
    assert recorded.perplexity == plain.perplexity
    assert len(recorded.last("probe", "target_error_nats2")) == 2
    assert plain.last("probe", "target_error_nats2") is None


def test_heads_move_to_their_target(train_tiny):
    words = ["train.steps=60", "train.peak_learning_rate=3e-3", "train.warmup_share=0", "model.initializer_range=0.1"]
    run = train_tiny(*TARGET, *words, "train.entropy_weight=1", "train.entropy_layers=[1]", "probe.every_steps=60")
    (_, before), (_, after) = run.series("probe", "entropy_nats")
    distance_before, distance_after = (np.abs(np.array(each) - 0.5 * CEILING) for each in (before, after))
    assert distance_before[1].min() > 0.9
    assert distance_after[1].max() < 0.5
    assert distance_after[0].min() > 0.8
    not_moved, moved = run.last("probe", "target_distance_nats")
    assert math.isnan(not_moved)
    assert moved < 0.5


def test_the_term_has_the_gradient_of_the_squared_distance():
    config = NormFreeConfig(num_attention_heads=3, hidden_size=48)
    ascending = np.array([[0.5, 1.0, 2.0]])
    objective = EntropyTarget(config, 0.7, (4,), targets=lambda step: ascending)
    entropies = torch.tensor([[1.9, 0.2, 0.4]], requires_grad=True)
    assert objective.term(entropies, 1.0).item() == 0
    objective.advance(1, lambda values: values)
    (gradient,) = torch.autograd.grad(objective.term(entropies, 1.0), entropies)
    matched = torch.tensor([[2.0, 0.5, 1.0]])  # the lowest entropy goes to the lowest target
    (expected,) = torch.autograd.grad(0.7 * (entropies - matched).square().mean(), entropies)
    torch.testing.assert_close(gradient, expected)
    assert objective.values()["target_error_nats2"][4] == pytest.approx((entropies - matched).square().mean().item())


def test_the_band_has_a_dead_zone_and_a_learnable_centre():
    config = NormFreeConfig(num_attention_heads=3, hidden_size=48)
    objective = EntropyBand(config, 1.0, (0,), ceiling=2.0)
    entropies = torch.tensor([[1.0, 1.39, 1.9]], requires_grad=True)  # the band is 1.0 +- 0.4
    objective.term(entropies, 1.0)
    objective.advance(1, lambda values: values)
    gradient, centre = torch.autograd.grad(objective.term(entropies, 1.0), [entropies, objective.theta_LH])
    deviation = torch.tensor([[0.0, 0.0, 0.9]])
    torch.testing.assert_close(gradient, 2 * deviation / 3)
    torch.testing.assert_close(centre, -2 * 2.0 * deviation / 3)


@pytest.fixture
def donor(train_tiny) -> Run:
    return train_tiny("probe.every_steps=2", runs="donors")


def test_a_profile_sorts_averages_and_interpolates(train_tiny, tiny_spec, donor):
    second = train_tiny("probe.every_steps=2", "seed=1", runs="donors")
    profile = [f"train.entropy_profile=['{donor.folder.parent}']", "train.entropy_layers=[1]"]
    spec = tiny_spec("variant=sm-r", *TARGET[:2], *profile)
    config = NormFreeConfig(**{**spec.model, "vocab_size": 300, "max_position_embeddings": 16})
    objective = build_objective(spec, config, steps=6)
    series = [dict(run.series("probe", "entropy_nats")) for run in (donor, second)]
    at = {step: np.mean([np.sort(np.array(each[step])[1]) for each in series], axis=0) for step in (2, 4)}
    np.testing.assert_allclose(objective.targets(3)[0], (at[2] + at[4]) / 2)
    np.testing.assert_allclose(objective.targets(4)[0], at[4])
    reversed_spec = replace(spec, train=replace(spec.train, entropy_layers=(0, 1), entropy_profile_layers=(1, 0)))
    np.testing.assert_allclose(build_objective(reversed_spec, config, steps=6).targets(4)[0], at[4])


def test_a_study_stops_before_its_first_run_without_donors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"entropy_profile: .*cause-donors/sm-r-seed20 does not exist"):
        run_study("cause-pilot")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.entropy_profile=[nowhere]"], "nowhere"),
        (["train.entropy_profile=['{donor}']", "model.num_hidden_layers=3"], "num_hidden_layers is 2 there and 3 here"),
        (["train.entropy_profile=['{donor}']", "train.steps=5"], "train.steps is 6 there and 5 here"),
        (["train.entropy_nats=[0.1]"], "give a number for each of the 2 layers"),
        (["train.entropy_nats=[0.1,3.0]"], "from 0 to the ceiling of 1.917 nats"),
        (["train.entropy_share=1.5"], "entropy_share"),
        ([], "needs exactly one of train.entropy_share, train.entropy_nats and train.entropy_profile, got none"),
        (["train.entropy_share=0.5", "train.entropy_layers=[2]"], "give layers of 0 to 1, each once"),
        (["train.entropy_nats=[1,1.5]", "train.entropy_layers=[1,0]"], "give layers of 0 to 1, each once"),
        (["train.entropy_profile=['{donor}']", "train.entropy_profile_layers=[1]"], "give 2 layers of 0 to 1, one for"),
        (["train.entropy_share=0.5", "train.entropy_profile_layers=[1,0]"], "is read with train.entropy_profile"),
        (["variant=sm-sink-r", "train.entropy_share=0.5"], "train.objective=entropy_target with model.attention_sink"),
    ],
)
def test_targets_that_do_not_fit_are_refused(train_tiny, donor, words, message):
    with pytest.raises(ValueError, match=message):
        train_tiny(*TARGET[:2], *(word.format(donor=donor.folder) for word in words))


def test_a_donor_without_probes_is_refused(train_tiny, tiny_spec):
    donor = train_tiny("probe.measures=[slopes]", runs="donors")
    spec = tiny_spec("variant=sm-r", *TARGET)
    with pytest.raises(ValueError, match="has no probes of entropy"):
        read_profile((str(donor.folder),), spec, NormFreeConfig(**spec.model), steps=6)


def test_muon_orthogonalises_each_matrix_and_leaves_the_rest_to_adamw(tiny_spec):
    train = tiny_spec("variant=sm-r", "train.optimizer=muon").train
    model = small_model(norm="layernorm")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = MuonWithAdamW(model, parameter_groups(model, train), train)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    rate = train.peak_learning_rate
    for name, parameter in model.named_parameters():
        moved = before[name] * (1 - rate * (train.weight_decay if parameter.ndim == 2 else 0)) - parameter.detach()
        if not ("layers" in name and parameter.ndim == 2):
            torch.testing.assert_close(moved, rate * parameter.grad.sign(), atol=1e-6, rtol=1e-3)
            continue
        parts = moved.split(32) if "qkv" in name else [moved]
        gradients = parameter.grad.split(32) if "qkv" in name else [parameter.grad]
        for part, gradient in zip(parts, gradients, strict=True):
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
            scale = rate * 0.2 * max(part.shape) ** 0.5
            # Five Newton-Schulz steps in bf16 give singular values between 0.7 and 1.2.
            sigmas = torch.einsum("rk,rc,kc->k", left, part, right) / scale
            assert sigmas.quantile(0.2) > 0.6
            assert sigmas.max() < 1.3
