"""What a machine or a number of processes cannot train is refused with what would work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import SGD
from transformers import get_scheduler

from normfree.data import prepare
from normfree.spec.run import RunSpec
from normfree.training.arguments import check_held_out, check_machine, total_steps, training_arguments


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "advice"),
    [
        (512, 128, 8, "train.micro_batch_sequences=64"),
        (8, 8, 2, "train.micro_batch_sequences=4"),
        (24, 8, 2, "train.micro_batch_sequences=6"),
        (8, 8, 3, "another number of processes or train.batch_sequences=24"),
        (512, 128, 3, "another number of processes or train.batch_sequences=384"),
        (2, 1, 4, "another number of processes or train.batch_sequences=4"),
    ],
)
def test_a_batch_that_the_processes_cannot_share_is_refused_with_one_that_they_can(
    batch: int,
    micro: int,
    processes: int,
    advice: str,
    tiny_spec: Callable[..., RunSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "normfree.training.arguments.PartialState", lambda: SimpleNamespace(num_processes=processes)
    )  # what torchrun would start
    own = [f"train.batch_sequences={batch}", f"train.micro_batch_sequences={micro}"]
    with pytest.raises(ValueError, match=f"times the {processes} processes; give {advice}$"):
        check_machine(tiny_spec(*own), torch.device("cpu"))
    followed = advice.rpartition(" ")[2]
    check_machine(tiny_spec(*(word for word in own if word[:9] != followed[:9]), followed), torch.device("cpu"))


@pytest.mark.parametrize("key", ["probe.sequences", "probe.final_sequences", "train.evaluation_sequences"])
def test_each_process_has_a_sequence_to_measure(
    key: str, tiny_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normfree.training.arguments.PartialState", lambda: SimpleNamespace(num_processes=2))
    words = ["train.batch_sequences=4", "train.micro_batch_sequences=2"]
    with pytest.raises(ValueError, match=f"{key}=1 leaves some of the 2 processes without one; give 2"):
        check_machine(tiny_spec(*words, f"{key}=1"), torch.device("cpu"))
    check_machine(tiny_spec(*words, f"{key}=2"), torch.device("cpu"))


def test_each_process_has_a_held_out_block(
    cache: Path, tiny_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = prepare(tiny_spec().data, cache=cache, progress=False)
    blocks = len(corpus.validation)
    for processes in (1, blocks):
        monkeypatch.setattr(
            "normfree.training.arguments.PartialState", lambda count=processes: SimpleNamespace(num_processes=count)
        )
        check_held_out(corpus)
    monkeypatch.setattr("normfree.training.arguments.PartialState", lambda: SimpleNamespace(num_processes=blocks + 1))
    with pytest.raises(
        ValueError, match=rf"{blocks} held-out blocks leave .*; give more .* at most {blocks} processes"
    ):
        check_held_out(corpus)


@pytest.mark.parametrize("steps", [50, 115, 229])
def test_the_epochs_that_are_advised_give_the_steps_that_were_asked_for(
    tiny_spec: Callable[..., RunSpec], steps: int
) -> None:
    corpus: Any = SimpleNamespace(train=range(100))
    batch = ["train.batch_sequences=3", "train.micro_batch_sequences=3"]
    with pytest.raises(ValueError, match=r"train\.steps=null train\.epochs=") as refused:
        total_steps(tiny_spec(*batch, f"train.steps={steps}"), corpus)
    advised = str(refused.value).rpartition("train.steps=null ")[2]
    assert steps <= total_steps(tiny_spec(*batch, "train.steps=null", advised), corpus) <= steps + 1


def test_warm_up_leaves_a_step_to_fall(tiny_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    """0.95 of 5 steps rounds to all of them, and the schedule would divide by none."""
    arguments = training_arguments(tiny_spec("train.steps=5", "train.warmup_share=0.95"), steps=5, output=tmp_path)
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    kwargs = arguments.lr_scheduler_kwargs
    schedule = get_scheduler("polynomial", optimizer, int(arguments.warmup_steps), 5, scheduler_specific_kwargs=kwargs)
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert rates[5] < 1e-3


def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(
    tiny_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normfree.training.arguments.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs wandb, which is not installed"):
        check_machine(tiny_spec("train.trackers=[wandb]"), torch.device("cpu"))


def test_one_process_of_torchrun_trains_on_one_of_several_gpus(
    tiny_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_machine(tiny_spec(), torch.device("cpu"))


@pytest.fixture
def unusable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job with a GPU and a torch that cannot use it: a driver too old, a build for the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_JOB_GPUS", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("build", "said"), [(None, "built without CUDA"), ("13.0", "built for CUDA 13.0")])
def test_a_gpu_that_torch_cannot_use_is_not_passed_over_in_silence(
    build: str | None,
    said: str,
    unusable_gpu: None,
    tiny_spec: Callable[..., RunSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", build)
    with pytest.raises(ValueError, match=rf"SLURM_JOB_GPUS=3.*{said}.*CUDA_VISIBLE_DEVICES=-1 before the command"):
        check_machine(tiny_spec(), torch.device("cpu"))


@pytest.mark.parametrize("build", [None, "13.0"])
def test_a_torch_for_the_cpu_is_taken_at_its_word_outside_of_jobs(
    build: str | None,
    unusable_gpu: None,
    tiny_spec: Callable[..., RunSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "nvidia3").touch()
    monkeypatch.setattr("normfree.training.arguments.DEVICES", tmp_path)
    monkeypatch.delenv("SLURM_JOB_GPUS")
    monkeypatch.setattr(torch.version, "cuda", build)
    refused = pytest.raises(ValueError, match=r"nvidia3.*built for CUDA 13\.0") if build else nullcontext()
    with refused:
        check_machine(tiny_spec(), torch.device("cpu"))


@pytest.mark.parametrize("value", ["", "-1"])
def test_the_cpu_of_a_machine_with_a_gpu_trains_when_asked(
    value: str, unusable_gpu: None, tiny_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    check_machine(tiny_spec(), torch.device("cpu"))


def test_bf16_that_a_gpu_only_emulates_is_refused(
    tiny_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a V100: torch says that bf16 is supported there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=7))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert torch.cuda.is_bf16_supported()
    with pytest.raises(ValueError, match=r"train\.precision=bf16 needs .*; give train\.precision=fp16"):
        check_machine(tiny_spec("train.precision=bf16"), torch.device("cuda"))
    check_machine(tiny_spec("train.precision=fp16"), torch.device("cuda"))
