"""Runs on CUDA: three precisions, the CPU's first losses, accumulation, and what counts as divergence."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from normfree.store.runs import Run, read_run
from normfree.training.trainer import NormFreeTrainer
from tests.training.runs import act_in

STEPS = 20
LONGER = [f"train.steps={STEPS}", "train.checkpoint_every=100", "train.evaluate_every=10", "probe.every_steps=10"]


@pytest.fixture
def run(train_tiny: Callable[..., Run]) -> Callable[..., Run]:
    """`run(*overrides)` trains and reads the folder back."""
    numbers = itertools.count()
    return lambda *overrides: train_tiny(*LONGER, *overrides, runs=str(next(numbers)))


def losses(run: Run) -> list[float]:
    assert run.status == "finished", f"{run.status}: {run.facts.get('error') or run.facts.get('divergence')}"
    return [value for _, value in run.series("train", "loss")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_finishes_and_records_its_measurements(precision: str, run: Callable[..., Run]) -> None:
    measured = run(f"train.precision={precision}", "variant=leaky-per-layer")
    curve = losses(measured)
    assert (len(curve), measured.facts["steps_done"]) == (STEPS, STEPS)
    assert all(math.isfinite(loss) for loss in curve)
    assert curve[-1] < curve[0]
    assert measured.facts["environment"]["device"] == torch.cuda.get_device_name()
    ceiling = math.lgamma(17) / 16
    for split, steps in (("probe", [0, 10, 20]), ("final", [20])):
        series = measured.series(split, "entropy_nats")
        assert [step for step, _ in series] == steps
        entropy = torch.tensor([value for _, value in series])
        assert entropy.shape[1:] == (2, 2)
        assert ((entropy > 0) & (entropy <= ceiling + 1e-5)).all()
    assert measured.last("probe", "ceiling_nats") == pytest.approx([ceiling] * 2)
    assert not torch.tensor(measured.last("probe", "nonfinite_rows")).any()
    slopes = measured.series("probe", "negative_slope")
    assert slopes[0][1] == pytest.approx([0.01, 0.01])
    assert slopes[-1][1] != pytest.approx([0.01, 0.01], abs=1e-5)
    assert 1 < measured.perplexity < 300


def test_first_losses_in_half_precision_are_near_fp32(run: Callable[..., Run]) -> None:
    exact = losses(run("train.precision=fp32"))
    for precision, tolerance in (("bf16", 2e-3), ("fp16", 1e-3)):
        assert losses(run(f"train.precision={precision}"))[:10] == pytest.approx(exact[:10], rel=tolerance), precision


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_micro_batches_and_repeated_activations_change_no_loss(precision: str, run: Callable[..., Run]) -> None:
    tolerance = 1e-4 if precision == "fp32" else 2e-3
    whole = run(f"train.precision={precision}")
    for override in ("train.micro_batch_sequences=2", "train.gradient_checkpointing=true"):
        other = run(f"train.precision={precision}", override)
        assert losses(other) == pytest.approx(losses(whole), rel=tolerance), override
        assert other.perplexity == pytest.approx(whole.perplexity, rel=5 * tolerance)
        norms = [[value for _, value in each.series("train", "gradient_norm")] for each in (whole, other)]
        assert norms[1][:5] == pytest.approx(norms[0][:5], rel=50 * tolerance)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
def test_a_learning_rate_that_breaks_the_model_diverges(precision: str, run: Callable[..., Run]) -> None:
    rates = ("train.peak_learning_rate=1e18", "train.final_learning_rate=0", "train.max_gradient_norm=1e9")
    measured = run(f"train.precision={precision}", "variant=sm-g", *rates)
    assert measured.status == "diverged", f"{measured.status}: {measured.series('train', 'loss')}"
    assert measured.facts["steps_done"] == measured.facts["divergence"]["step"] - 1 < STEPS
    assert all(math.isfinite(value) for _, value in measured.series("train", "loss"))
    assert math.isnan(measured.perplexity)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_nan_weight_diverges_at_its_step_and_layer(
    precision: str, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(trainer: NormFreeTrainer) -> None:
        if trainer.state.global_step == 3:
            with torch.no_grad():
                trainer.network.model.layers[1].attention.qkv.weight[0, 0] = math.nan

    act_in("training_step", breaking, monkeypatch)
    measured = run(f"train.precision={precision}")
    assert measured.status == "diverged"
    divergence = measured.facts["divergence"]
    assert (divergence["step"], divergence["layer"], divergence["kind"]) == (4, 1, "weight")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_between_lines_never_wait_for_the_gpu(
    precision: str, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises where something does."""

    def watching(trainer: NormFreeTrainer) -> None:
        step = trainer.state.global_step + 1
        torch.cuda.set_sync_debug_mode("default" if step % 5 == 0 or step == 1 else "error")

    act_in("training_step", watching, monkeypatch)
    try:
        measured = run(f"train.precision={precision}", "train.log_every=5")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert measured.status == "finished", measured.facts.get("error")


def test_steps_skipped_by_the_fp16_scaler_are_no_divergence(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a first scale of 2^30 gradients overflow until it has been halved often enough."""
    scales: dict[int, float] = {}

    def watching(trainer: NormFreeTrainer) -> None:
        scaler, step = trainer.accelerator.scaler, trainer.state.global_step + 1
        if step == 1:
            scaler._init_scale = 2.0**30
        else:
            scales[step] = scaler.get_scale()

    act_in("training_step", watching, monkeypatch)
    measured = run("train.precision=fp16", "train.steps=40")
    assert measured.status == "finished", measured.facts["divergence"]
    assert scales[2] == 2.0**29, f"the first step was not skipped: scales {scales}"
    assert scales[40] == scales[30], f"the scale never settled: {scales}"
    assert len(losses(measured)) == 40
    assert measured.facts["skipped_steps"] == []


def test_first_losses_in_fp32_match_the_cpu(run: Callable[..., Run], tiny: list[str], tmp_path: Path) -> None:
    measured = run("train.precision=fp32", "variant=leaky-per-layer")
    words = ["train", *tiny, *LONGER, "variant=leaky-per-layer"]
    words += [f"runs_dir={tmp_path / 'cpu'}", f"cache_dir={tmp_path / 'cache'}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-m", "normfree", *words], env=environment, check=True)
    reference = read_run(tmp_path / "cpu" / "single" / measured.folder.name)
    assert reference.facts["environment"]["device"] == "cpu"
    assert reference.corpus == measured.corpus
    assert losses(measured) == pytest.approx(losses(reference), rel=1e-3)
    assert measured.perplexity == pytest.approx(reference.perplexity, rel=1e-3)
    entropy, expected = (torch.tensor(each.last("final", "entropy_nats")) for each in (measured, reference))
    torch.testing.assert_close(entropy, expected, atol=1e-3, rtol=0)
