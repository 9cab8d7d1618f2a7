"""A NaN that enters a weight, a gradient or an embedding at a known step, in real training."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from normfree.training.trainer import NormFreeTrainer
from tests.training.runs import Observed, act_in, moments, of_every_family, watch_steps


def matrix_of_layer_1(model: torch.nn.Module) -> torch.nn.Parameter:
    return next(p for name, p in model.named_parameters() if ".1." in name and p.ndim == 2)


def nan_weight(model: torch.nn.Module) -> None:
    with torch.no_grad():
        matrix_of_layer_1(model)[0, 0] = math.nan


def nan_gradient(model: torch.nn.Module) -> Callable[[], None]:
    return matrix_of_layer_1(model).register_hook(lambda gradient: gradient * math.nan).remove


def nan_embedding(model: torch.nn.Module) -> Callable[[], None]:
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return embedding.register_forward_hook(lambda _module, _inputs, output: output * math.nan).remove


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Observed]:
    """`inject(injection, *steps)`: apply an injection in these steps of the runs that follow."""

    def install(injection: Callable[[torch.nn.Module], Callable[[], None] | None], *steps: int) -> Observed:
        observed = Observed()

        def begin(trainer: NormFreeTrainer, inputs: dict[str, Any]) -> Callable[[], None] | None:
            return injection(trainer.network) if observed.record(trainer, inputs) in steps else None

        watch_steps(begin, monkeypatch)
        return observed

    return install


@of_every_family
@pytest.mark.parametrize(
    ("injection", "kind", "layer"),
    [(nan_weight, "weight", 1), (nan_gradient, "gradient", 1), (nan_embedding, "activation", None)],
)
def test_a_nan_is_located_and_never_reaches_adam(train_tiny, inject, injection, kind, layer, monkeypatch) -> None:
    inject(injection, 4)
    trainers: list[NormFreeTrainer] = []
    act_in("_skip_or_stop", trainers.append, monkeypatch)
    run = train_tiny()
    divergence = run.facts["divergence"]
    assert (run.status, divergence["step"], divergence["kind"], divergence["layer"]) == ("diverged", 4, kind, layer)
    assert run.facts["steps_done"] == 3
    assert math.isnan(run.score)
    assert [step for step, _ in run.series("train", "loss")] == [1, 2, 3]
    assert len(moments(*trainers)) > 0
    assert all(torch.isfinite(tensor).all() for tensor in moments(*trainers))
    assert not list(run.folder.glob("checkpoints/.staging"))


@of_every_family
def test_a_skipped_step_changes_nothing_but_takes_its_batch(train_tiny, inject) -> None:
    clean = inject(nan_gradient)
    train_tiny(runs="clean")
    observed = inject(nan_gradient, 3, 4)
    run = train_tiny("train.on_nonfinite=skip:2")
    assert (run.status, run.facts["steps_done"]) == ("finished", 6)
    assert [observed.changed_in(step) for step in (2, 3, 4, 5)] == [True, False, False, True]
    assert all(torch.equal(*pair) for pair in zip(observed.states[3], clean.states[3], strict=True))
    assert all(torch.equal(observed.batches[step], clean.batches[step]) for step in range(1, 7))
    skipped = [(divergence["step"], divergence["kind"]) for divergence in run.facts["skipped_steps"]]
    assert skipped == [(3, "gradient"), (4, "gradient")]
    assert run.series("train", "skipped_step") == [(3, 1), (4, 2)]
    assert [step for step, _ in run.series("train", "loss")] == [1, 2, 5, 6]
    assert all(math.isfinite(loss) for _, loss in run.series("train", "loss"))


def test_a_logged_mean_counts_taken_steps_only(train_tiny, inject) -> None:
    """And the gradient norm of a skipped step is missing, not zero."""
    inject(nan_embedding, 3)
    words = ("train.on_nonfinite=skip:1", "train.micro_batch_sequences=4")
    losses = dict(train_tiny(*words, runs="each").series("train", "loss"))
    means = train_tiny(*words, "train.log_every=3")
    expected = {1: losses[1], 3: pytest.approx(losses[2]), 6: pytest.approx((losses[4] + losses[5] + losses[6]) / 3)}
    assert dict(means.series("train", "loss")) == expected
    norms = dict(means.series("train", "gradient_norm"))
    assert math.isnan(norms[3])
    assert norms[6] > 0


def test_the_count_of_skips_survives_a_resume(train_tiny, inject) -> None:
    words = "train.on_nonfinite=skip:1", "train.checkpoints_kept=3"
    inject(nan_gradient, 3)
    folder = train_tiny(*words).folder
    (folder / "run.json").unlink()  # the count comes from the checkpoint alone
    (folder / "checkpoints" / "checkpoint-6" / "manifest.json").unlink()
    inject(nan_gradient, 5)
    run = train_tiny(*words)
    assert (run.status, run.facts["divergence"]["step"]) == ("diverged", 5)
    assert [divergence["step"] for divergence in run.facts["skipped_steps"]] == [3]


def test_overflow_at_any_scale_ends_an_fp16_run(train_tiny, inject, monkeypatch) -> None:
    """The scaler skips each such step, so the run would end untrained. PyTorch's scaler runs on the CPU too."""
    create = NormFreeTrainer.create_accelerator_and_postprocess

    def with_scaler(trainer: NormFreeTrainer) -> None:
        create(trainer)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-12)

    monkeypatch.setattr(NormFreeTrainer, "create_accelerator_and_postprocess", with_scaler)
    inject(nan_gradient, 2, 3, 4, 5, 6)
    run = train_tiny()
    divergence = run.facts["divergence"]
    assert (run.status, divergence["step"], divergence["kind"], divergence["layer"]) == ("diverged", 4, "gradient", 1)
