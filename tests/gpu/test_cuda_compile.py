"""What compiles on CUDA: a run with train.compile, a probed model, FlexAttention."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from normfree.entropy import EntropyProbe
from normfree.store.runs import Run

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="triton needs a C compiler"
)
IDS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_has_plain_losses_and_fp32_products(precision: str, train_tiny: Callable[..., Run]) -> None:
    """transformers turns TF32 on for all of the process where a compiled run does not say what it wants."""
    words = [f"train.precision={precision}", "model.num_hidden_layers=1", "train.evaluate_every=100"]
    words += ["train.evaluation_sequences=8", "probe.every_steps=100", "probe.final_sequences=8"]
    curves = []
    for compiled in ("false", "true", "cuda_graph"):
        run = train_tiny(*words, f"train.compile={compiled}", runs=compiled)
        assert run.status == "finished", run.facts.get("error") or run.facts["divergence"]
        assert torch.backends.fp32_precision != "tf32", "TF32 is on for the rest of this process"
        curves.append([*(value for _, value in run.series("train", "loss")), run.facts["final"]["loss_nats"]])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-4 if precision == "fp32" else 2e-3)


def test_a_compiled_model_is_measured_as_plain(build: Callable[..., Any]) -> None:
    model = build(norm="none").to(DEVICE)
    ids = IDS.to(DEVICE)

    def measured(called: Any) -> Any:
        with EntropyProbe(called) as probe, torch.no_grad():
            logits = called(input_ids=ids, use_cache=False).logits
        return logits, probe.statistics()

    logits, plain = measured(model)
    compiled_logits, compiled = measured(torch.compile(model))
    torch.testing.assert_close(compiled_logits, logits, atol=1e-4, rtol=1e-4)
    assert compiled.rows.unique().tolist() == [80]
    torch.testing.assert_close(compiled.mean_nats(), plain.mean_nats(), atol=1e-5, rtol=0)


def test_flex_attention_matches_sdpa_and_refuses_a_probe(build: Callable[..., Any]) -> None:
    model = build(norm="none").to(DEVICE)
    ids = IDS.to(DEVICE)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model.set_attn_implementation("flex_attention")
        logits = model(ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
        with EntropyProbe(model), pytest.raises(ValueError, match="attn_implementation='sdpa'"):
            model(ids, use_cache=False)
