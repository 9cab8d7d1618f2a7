"""fp32 means fp32, whatever an image, Trainer or Accelerate choose for speed."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from accelerate import PartialState
from transformers import Trainer
from transformers.utils.import_utils import enable_tf32

from normfree.training.trainer import NormFreeTrainer
from tests.training.runs import act_in


def test_no_run_trains_with_tf32_after_a_compiled_one(train_tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an Ampere GPU: TrainingArguments turns TF32 on for compiled bf16, Accelerate for compiled fp32."""
    precisions: list[tuple[str, str]] = []
    prepare = Trainer.create_accelerator_and_postprocess

    def current() -> tuple[str, str]:
        return torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    def as_accelerate_does_on_cuda(trainer: Trainer) -> None:
        prepare(trainer)
        if trainer.args.torch_compile and not trainer.args.bf16:
            torch.backends.cuda.matmul.allow_tf32 = True

    before = current()
    act_in("training_step", lambda _: precisions.append(current()), monkeypatch)
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", as_accelerate_does_on_cuda)
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("normfree.training.precision.has_bf16_units", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    enable_tf32.cache_clear()
    for precision, compiled in (("fp32", "false"), ("bf16", "true"), ("fp32", "false"), ("fp32", "true")):
        words = ["train.steps=1", f"train.precision={precision}", f"train.compile={compiled}"]
        train_tiny(*words, f"tag={len(precisions)}")
    assert precisions == [("ieee", "ieee")] * 4
    assert current() == before


IGNORED = ("ACCELERATE_MIXED_PRECISION=bf16", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "ACCELERATE_USE_DEEPSPEED=true")
IGNORED += ("ACCELERATE_USE_FSDP=true", "ACCELERATE_USE_MEGATRON_LM=true", "ACCELERATE_USE_PARALLELISM_CONFIG=true")
IGNORED += ("ACCELERATE_TORCH_DEVICE=meta", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "ACCELERATE_USE_CPU=maybe")


@pytest.mark.parametrize("variable", IGNORED)
def test_the_spec_wins_over_accelerate_variables(train_tiny, monkeypatch, caplog, variable: str) -> None:
    states: list[tuple[str, str, str]] = []

    def record(trainer: NormFreeTrainer) -> None:
        state = trainer.accelerator.state
        states.append((state.mixed_precision, state.dynamo_plugin.backend.value, state.distributed_type.value))

    act_in("training_step", record, monkeypatch)
    name, _, value = variable.partition("=")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    with caplog.at_level(logging.WARNING, logger="normfree"):
        train_tiny("train.steps=1")
    assert states == [("no", "NO", "NO")]
    assert f"the run's own keys decide: {variable}" in caplog.text
    assert os.environ[name] == value


@pytest.mark.parametrize("variable", ["NVIDIA_TF32_OVERRIDE=1", "ONEDNN_DEFAULT_FPMATH_MODE=BF16"])
def test_variables_that_lower_fp32_precision_are_refused(tmp_path, train_tiny, monkeypatch, variable: str) -> None:
    monkeypatch.setenv(*variable.split("="))
    with pytest.raises(ValueError, match=variable):
        train_tiny()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_command_undoes_the_tf32_of_an_image() -> None:
    code = """
import torch
from normfree.training.processes import prepare_process

before = torch.backends.cuda.matmul.fp32_precision
prepare_process()
print(before, torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision())
"""
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tf32", "ieee", "highest"]
