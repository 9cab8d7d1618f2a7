"""What this machine or number of processes cannot train is refused."""

from types import SimpleNamespace

import pytest
import torch

from normfree.training.arguments import check_machine, total_steps, training_arguments

CPU = torch.device("cpu")


@pytest.mark.parametrize(("batch", "micro", "processes"), [(512, 128, 8), (8, 8, 3), (2, 1, 4)])
def test_processes_must_share_a_batch_evenly(batch, micro, processes, tiny_spec, monkeypatch) -> None:
    state = SimpleNamespace(num_processes=processes)
    monkeypatch.setattr("normfree.training.arguments.PartialState", lambda: state)
    with pytest.raises(ValueError, match=rf"batch_sequences={batch} must .*={micro} times the {processes} processes"):
        check_machine(tiny_spec(f"train.batch_sequences={batch}", f"train.micro_batch_sequences={micro}"), CPU)
    check_machine(tiny_spec(f"train.batch_sequences={micro * processes}", f"train.micro_batch_sequences={micro}"), CPU)


@pytest.mark.parametrize("steps", [50, 115, 229])
def test_the_advised_epochs_give_the_requested_steps(tiny_spec, steps: int) -> None:
    corpus = SimpleNamespace(train=range(100))
    batch = ["train.batch_sequences=3", "train.micro_batch_sequences=3"]
    with pytest.raises(ValueError, match=r"train\.steps=null train\.epochs=") as refused:
        total_steps(tiny_spec(*batch, f"train.steps={steps}"), corpus)
    advised = str(refused.value).rpartition("train.steps=null ")[2]
    assert steps <= total_steps(tiny_spec(*batch, "train.steps=null", advised), corpus) <= steps + 1


def test_a_missing_tracker_is_refused_before_training(tiny_spec, monkeypatch) -> None:
    monkeypatch.setattr("normfree.training.arguments.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs wandb, not installed"):
        check_machine(tiny_spec("train.trackers=[wandb]"), CPU)


def test_a_process_with_several_gpus_needs_torchrun(tiny_spec, monkeypatch) -> None:
    """Trainer would give each of them a batch, and no record would say so."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"sees 4 GPUs.*CUDA_VISIBLE_DEVICES=0.*torchrun"):
        check_machine(tiny_spec(), CPU)
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_machine(tiny_spec(), CPU)


@pytest.mark.parametrize(("value", "mode"), [("false", None), ("true", None), ("cuda_graph", "reduce-overhead")])
def test_cuda_graphs_are_a_mode_of_the_compiler(value, mode, tiny_spec, tmp_path) -> None:
    arguments = training_arguments(tiny_spec(f"train.compile={value}"), steps=6, output=tmp_path)
    assert (arguments.torch_compile, arguments.torch_compile_mode) == (value != "false", mode)


def test_cuda_graphs_need_a_gpu_and_one_pass(tiny_spec) -> None:
    with pytest.raises(ValueError, match=r"cuda_graph needs an NVIDIA GPU; train\.compile=true"):
        check_machine(tiny_spec("train.compile=cuda_graph"), CPU)
    check_machine(tiny_spec("train.compile=cuda_graph"), torch.device("cuda"))
    with pytest.raises(ValueError, match=r"one pass of one process.*micro_batch_sequences=8"):
        check_machine(tiny_spec("train.compile=cuda_graph", "train.micro_batch_sequences=4"), torch.device("cuda"))


def test_a_gpu_that_torch_cannot_use_is_refused(tiny_spec, tmp_path, monkeypatch) -> None:
    """Unless CUDA_VISIBLE_DEVICES chooses the CPU, or torch was built for it."""
    (tmp_path / "nvidia3").touch()
    monkeypatch.setattr("normfree.training.arguments.DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for chosen in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        check_machine(tiny_spec(), CPU)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ValueError, match=r"built for CUDA 13\.0, cannot use.*CUDA_VISIBLE_DEVICES=-1"):
        check_machine(tiny_spec(), CPU)
    monkeypatch.setattr(torch.version, "cuda", None)
    check_machine(tiny_spec(), CPU)


def test_bf16_that_a_gpu_only_emulates_is_refused(tiny_spec, monkeypatch) -> None:
    """As on a V100: torch says that bf16 is supported there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=7))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert torch.cuda.is_bf16_supported()
    with pytest.raises(ValueError, match=r"train\.precision=bf16 needs .*: give fp16"):
        check_machine(tiny_spec("train.precision=bf16"), torch.device("cuda"))
    check_machine(tiny_spec("train.precision=fp16"), torch.device("cuda"))
