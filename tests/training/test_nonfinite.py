"""A NaN that enters a weight, a gradient or an embedding at a known step, in real training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.spec.run import RunSpec
from normfree.store.runs import Run, read_run
from normfree.training import callbacks, train
from normfree.training.trainer import NormFreeTrainer

Build = Callable[..., RunSpec]
TRAINING_STEP = NormFreeTrainer.training_step


@dataclass
class Watched:
    """What was seen at the beginning of each step: weights, Adam's moments, token ids."""

    weights: dict[int, list[Tensor]] = field(default_factory=dict)
    moments: dict[int, list[Tensor]] = field(default_factory=dict)
    batches: dict[int, Tensor] = field(default_factory=dict)
    trainer: NormFreeTrainer | None = None

    def note(self, trainer: NormFreeTrainer, step: int, inputs: dict[str, Any]) -> None:
        self.trainer = trainer
        self.weights[step] = [p.detach().clone() for p in trainer.network.parameters()]
        self.moments[step] = moments(trainer)
        self.batches[step] = inputs["input_ids"].clone()


def moments(trainer: NormFreeTrainer) -> list[Tensor]:
    states = trainer.optimizer.state_dict()["state"].values()
    return [tensor.clone() for state in states for tensor in state.values() if isinstance(tensor, Tensor)]


def nan_weight(model: torch.nn.Module) -> Callable[[], None]:
    with torch.no_grad():
        dict(model.named_parameters())[WEIGHT][0, 0] = math.nan
    return lambda: None


def nan_gradient(model: torch.nn.Module) -> Callable[[], None]:
    return dict(model.named_parameters())[WEIGHT].register_hook(lambda gradient: gradient * math.nan).remove


def nan_embedding(model: torch.nn.Module) -> Callable[[], None]:
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return embedding.register_forward_hook(lambda _module, _inputs, output: output * math.nan).remove


WEIGHT = next(
    name
    for name, p in NormFreeForCausalLM(
        NormFreeConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    ).named_parameters()
    if ".1." in name and p.ndim == 2
)


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    """Train with `injection` applied at the given steps; returns what was seen."""

    def install(injection: Callable[[torch.nn.Module], Callable[[], None]], *steps: int) -> Watched:
        watched = Watched()

        def injecting(trainer: NormFreeTrainer, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            step = trainer.state.global_step + 1
            watched.note(trainer, step, inputs)
            undo = injection(trainer.network) if step in steps else lambda: None
            try:
                return TRAINING_STEP(trainer, model, inputs, num_items_in_batch)
            finally:
                undo()

        monkeypatch.setattr(NormFreeTrainer, "training_step", injecting)
        return watched

    return install


@pytest.mark.parametrize(
    ("injection", "kind", "layer"),
    [(nan_weight, "weight", 1), (nan_gradient, "gradient", 1), (nan_embedding, "activation", None)],
)
def test_a_nan_is_reported_at_its_step_and_never_reaches_adam(
    tmp_path: Path, cache: Path, tiny_spec: Build, inject: Callable[..., Watched], injection: Any, kind: str, layer: int
) -> None:
    watched = inject(injection, 4)
    run = read_run(train(tiny_spec(), runs_dir=tmp_path, cache=cache, progress=False))
    found = run.facts["divergence"]
    assert (run.status, found["step"], found["kind"], found["layer"]) == ("diverged", 4, kind, layer)
    assert run.facts["steps_done"] == 3
    assert watched.trainer is not None
    assert len(moments(watched.trainer)) > 0
    assert all(torch.isfinite(tensor).all() for tensor in moments(watched.trainer))
    assert not list(run.folder.glob("checkpoints/.staging"))


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_a_skipped_step_leaves_weights_and_adam_untouched_and_consumes_its_batch(
    tmp_path: Path, cache: Path, tiny_spec: Build, inject: Callable[..., Watched]
) -> None:
    clean = inject(nan_gradient)
    train(tiny_spec(), runs_dir=tmp_path / "clean", cache=cache, progress=False)
    watched = inject(nan_gradient, 3, 4)
    spec = tiny_spec("train.on_nonfinite=skip:2")
    run = read_run(train(spec, runs_dir=tmp_path / "skipping", cache=cache, progress=False))
    assert (run.status, run.facts["steps_done"]) == ("finished", 6)
    for step in (4, 5):
        assert same(watched.weights[step], watched.weights[3])
        assert same(watched.moments[step], watched.moments[3])
    assert not same(watched.weights[6], watched.weights[5])
    assert same(watched.weights[3], clean.weights[3])
    assert all(torch.equal(watched.batches[step], clean.batches[step]) for step in range(1, 7))
    assert [(one["step"], one["kind"]) for one in run.facts["skipped_steps"]] == [(3, "gradient"), (4, "gradient")]
    assert run.series("train", "skipped_step") == [(3, 1), (4, 2)]
    assert [step for step, _ in run.series("train", "loss")] == [1, 2, 5, 6]
    assert all(math.isfinite(loss) for _, loss in run.series("train", "loss"))


def test_a_logged_mean_counts_taken_steps_only_and_a_missing_gradient_is_not_a_zero(
    tmp_path: Path, cache: Path, tiny_spec: Build, inject: Callable[..., Watched]
) -> None:
    inject(nan_embedding, 3)
    overrides = ("train.on_nonfinite=skip:1", "train.micro_batch_sequences=4")
    each = read_run(train(tiny_spec(*overrides), runs_dir=tmp_path / "a", cache=cache, progress=False))
    spec = tiny_spec(*overrides, "train.log_every=3")
    means = read_run(train(spec, runs_dir=tmp_path / "b", cache=cache, progress=False))
    losses = dict(each.series("train", "loss"))
    assert dict(means.series("train", "loss")) == {
        1: losses[1],
        3: pytest.approx(losses[2]),
        6: pytest.approx((losses[4] + losses[5] + losses[6]) / 3),
    }
    norms = dict(means.series("train", "gradient_norm"))
    assert math.isnan(norms[3])
    assert norms[6] > 0


def test_more_than_n_skips_is_a_divergence_after_a_resume_too(
    tmp_path: Path, cache: Path, tiny_spec: Build, inject: Callable[..., Watched]
) -> None:
    spec = tiny_spec("train.on_nonfinite=skip:1", "train.checkpoints_kept=3")
    inject(nan_gradient, 3)
    folder = train(spec, runs_dir=tmp_path, cache=cache, progress=False)
    (folder / "run.json").unlink()  # the count comes from the checkpoint alone
    (folder / "checkpoints" / "checkpoint-6" / "manifest.json").unlink()
    inject(nan_gradient, 5)
    run = read_run(train(spec, runs_dir=tmp_path, cache=cache, progress=False))
    assert (run.status, run.facts["divergence"]["step"]) == ("diverged", 5)
    assert [one["step"] for one in run.facts["skipped_steps"]] == [3]


@pytest.mark.parametrize("policy", ["skip", "skip:0", "skip:-1", "skip:x", "go on", ""])
def test_an_unknown_policy_is_refused(tiny_spec: Build, policy: str) -> None:
    with pytest.raises(ValueError, match="allowed: stop, or skip:N"):
        tiny_spec(f"train.on_nonfinite='{policy}'")


def test_the_policy_belongs_to_identity_and_recipe(tiny_spec: Build) -> None:
    stop, skip = tiny_spec(), tiny_spec("train.on_nonfinite=skip:1")
    assert stop.identity() != skip.identity()
    assert stop.recipe() != skip.recipe()


def test_probe_and_validation_of_a_broken_model_are_numbers_not_errors() -> None:
    model = NormFreeForCausalLM(
        NormFreeConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, norm="none")
    )
    nan_weight(model)
    blocks_NT = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    measured = dict(callbacks.measurements(model, blocks_NT, ["heads", "perplexity"], batch_sequences=2))
    assert measured["nonfinite_rows"][1].sum() > 0
    assert math.isnan(measured["perplexity"])


def test_a_diverged_run_can_be_read_back(tmp_path: Path, cache: Path, tiny_spec: Build, inject: Any) -> None:
    inject(nan_weight, 2)
    run: Run = read_run(train(tiny_spec(), runs_dir=tmp_path, cache=cache, progress=False))
    assert math.isnan(run.perplexity)
    assert [step for step, _ in run.series("train", "loss")] == [1]


def test_gradients_that_overflow_at_any_scale_end_a_run_in_fp16(
    tmp_path: Path, cache: Path, tiny_spec: Build, inject: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler leaves each such step out, so the run would come to its end untrained. PyTorch's scaler runs on the
    CPU too; fp16 itself does not."""
    create = NormFreeTrainer.create_accelerator_and_postprocess

    def with_scaler(trainer: NormFreeTrainer) -> None:
        create(trainer)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-12)

    monkeypatch.setattr(NormFreeTrainer, "create_accelerator_and_postprocess", with_scaler)
    inject(nan_gradient, 2, 3, 4, 5, 6)
    run = read_run(train(tiny_spec(), runs_dir=tmp_path, cache=cache, progress=False))
    found = run.facts["divergence"]
    assert (run.status, found["step"], found["kind"], found["layer"]) == ("diverged", 4, "gradient", 1)
