"""fp32 means fp32, whatever an image, Trainer or Accelerate would make of it for speed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers import Trainer
from transformers.utils.import_utils import enable_tf32

from normfree.spec.run import RunSpec
from normfree.training import train
from normfree.training.trainer import NormFreeTrainer


def test_no_run_of_a_process_trains_with_tf32_after_a_compiled_one(
    tmp_path: Path, cache: Path, tiny_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an Ampere GPU: TrainingArguments turns TF32 on for compiled bf16, Accelerate for compiled fp32."""
    seen: list[tuple[str, str]] = []
    before = (torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    step, prepared = NormFreeTrainer.training_step, Trainer.create_accelerator_and_postprocess

    def noting(trainer: NormFreeTrainer, *rest: Any, **named: Any) -> Any:
        seen.append((torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return step(trainer, *rest, **named)

    def as_accelerate_does_on_cuda(trainer: Trainer) -> None:
        prepared(trainer)
        if trainer.args.torch_compile and not trainer.args.bf16:
            torch.backends.cuda.matmul.allow_tf32 = True

    monkeypatch.setattr(NormFreeTrainer, "training_step", noting)
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", as_accelerate_does_on_cuda)
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("normfree.training.bf16.has_bf16_units", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    enable_tf32.cache_clear()
    for precision, compiled in (("fp32", "false"), ("bf16", "true"), ("fp32", "false"), ("fp32", "true")):
        words = ["train.steps=1", f"train.precision={precision}", f"train.compile={compiled}"]
        train(tiny_spec(*words, f"tag={len(seen)}"), runs_dir=tmp_path, cache=cache, progress=False)
    assert seen == [("ieee", "ieee")] * 4
    assert (torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before


HIDDEN = ("ACCELERATE_MIXED_PRECISION=bf16", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "ACCELERATE_USE_DEEPSPEED=true")
HIDDEN += ("ACCELERATE_USE_FSDP=true", "ACCELERATE_USE_MEGATRON_LM=true", "ACCELERATE_USE_PARALLELISM_CONFIG=true")
HIDDEN += ("ACCELERATE_TORCH_DEVICE=meta", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "ACCELERATE_USE_CPU=maybe")


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Mixed precision, compiler and kind of each step from here on, as Accelerate has them."""
    seen: list[tuple[str, str, str]] = []
    step = NormFreeTrainer.training_step

    def noting(trainer: NormFreeTrainer, *rest: Any, **named: Any) -> Any:
        state = trainer.accelerator.state
        seen.append((state.mixed_precision, state.dynamo_plugin.backend.value, state.distributed_type.value))
        return step(trainer, *rest, **named)

    monkeypatch.setattr(NormFreeTrainer, "training_step", noting)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    return seen


@pytest.mark.parametrize("variable", HIDDEN)
def test_the_spec_wins_over_what_accelerate_reads(
    tmp_path: Path, cache: Path, tiny_spec: Callable[..., RunSpec], states: list, monkeypatch, caplog, variable: str
) -> None:
    name, _, value = variable.partition("=")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    with caplog.at_level(logging.WARNING, logger="normfree"):
        train(tiny_spec("train.steps=1"), runs_dir=tmp_path, cache=cache, progress=False)
    assert states == [("no", "NO", "NO")]
    assert f"not read, since the keys of a run decide: {variable}" in caplog.text
    assert os.environ[name] == value


@pytest.mark.parametrize(
    "variable", ["NVIDIA_TF32_OVERRIDE=1", "ONEDNN_DEFAULT_FPMATH_MODE=BF16", "TORCHDYNAMO_DISABLE=1"]
)
def test_what_no_program_can_undo_is_refused_by_name(
    tmp_path: Path, cache: Path, tiny_spec: Callable[..., RunSpec], monkeypatch, variable: str
) -> None:
    monkeypatch.setenv(*variable.split("="))
    with pytest.raises(ValueError, match=variable):
        train(tiny_spec("train.compile=true"), runs_dir=tmp_path, cache=cache, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_command_does_without_tf32_where_the_image_asks_for_it() -> None:
    code = """
import torch
from normfree.training.process import prepare_process

before = torch.backends.cuda.matmul.fp32_precision
prepare_process()
print(before, torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["tf32", "ieee", "highest"]
