"""train.sharding=fsdp: two and four gloo processes against one, kills, signals, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM

from normfree import Run, compose_run, read_run
from normfree.spec.run import ProbeSpec
from normfree.store.checkpoints import check_sharding, checkpoints_in
from normfree.training import arguments, sharding, train
from tests.small_model import small_model
from tests.training.runs import check_equal_runs, losses, weights
from tests.training.test_processes import started

# A command of which a process acts at a step: dies, gets a signal, or has a loss of NaN; or from then on, run ahead.
ACTING = """
import os, signal, sys
from torch.distributed.tensor import DTensor
from normfree.cli.main import main
from normfree.training import trainer as trainer_module
from normfree.training.trainer import NormFreeTrainer

action, at_step, *words = sys.argv[1:]
original = NormFreeTrainer.compute_loss
if action == "ahead":
    trainer_module.RUNS_AHEAD = ("cpu",)

def compute_loss(trainer, *rest, **named):
    assert all(isinstance(parameter, DTensor) for parameter in trainer.network.parameters())
    loss = original(trainer, *rest, **named)
    if trainer.state.global_step == int(at_step):
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "stop" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        if action == "nan" and os.environ["RANK"] == "1":
            loss = loss * float("nan")
    if action == "ahead" and trainer.state.global_step >= int(at_step) and os.environ["RANK"] == "1":
        loss = loss * float("nan")
    return loss

NormFreeTrainer.compute_loss = compute_loss
sys.exit(main(["train", "train.sharding=fsdp", *words]))
"""
# Processes have unequal numbers of passes in probes (5 sequences) and evaluations.
SIZES = f"""
    variant=leaky-shared train.steps=20 train.micro_batch_sequences=2 train.checkpoint_every=10 train.evaluate_every=10
    probe.every_steps=10 probe.measures=[{",".join(ProbeSpec().measures)}] probe.sequences=5 probe.final_sequences=5
"""
NAME = "leaky-shared-seed0"

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def words(tiny: list[str], cache: Path) -> list[str]:
    return [*tiny, *SIZES.split(), f"cache_dir={cache}"]


@pytest.fixture(scope="module")
def sharded(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`sharded(runs, *words, processes=2, action="none", at_step=0)`: status and output of a command with FSDP."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "acting.py").write_text(ACTING)

    def run(runs: Path, *more: str, processes: int = 2, action: str = "none", at_step: int = 0) -> tuple[int, str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*torchrun, "acting.py", action, str(at_step), *words, f"runs_dir={runs}", *more]
        with started(command, folder) as process:
            status = process.wait(timeout=200)
        return status, (folder / "output").read_text()

    return run


@pytest.fixture(scope="module")
def two(sharded: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes that nobody stopped."""
    runs = tmp_path_factory.mktemp("two")
    status, output = sharded(runs)
    assert status == 0, output
    return runs / "single" / NAME


@pytest.fixture(scope="module")
def one(words: list[str], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run in one process, without sharding."""
    runs = tmp_path_factory.mktemp("one")
    return read_run(train(compose_run(words).spec, runs_dir=runs, cache=cache, progress=False))


def check_close_runs(run: Run, other: Run) -> None:
    assert len(losses(other)) == 20
    assert losses(run) == pytest.approx(losses(other), rel=1e-5)
    for split, name in (("train", "gradient_norm"), ("validation", "loss"), ("probe", "negative_slope")):
        values = [torch.tensor([value for _, value in each.series(split, name)]) for each in (run, other)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    for name in ("entropy_nats", "rows"):
        finals = [torch.tensor(each.last("final", name)) for each in (run, other)]
        torch.testing.assert_close(*finals, rtol=1e-5, atol=1e-5)
    assert run.facts["final"] == pytest.approx(other.facts["final"], rel=1e-5)


@pytest.mark.slow
def test_two_sharded_processes_train_as_one(two: Path, one: Run) -> None:
    check_close_runs(read_run(two), one)
    expected = weights(one.folder)
    assert weights(two).keys() == expected.keys()
    for name, value in weights(two).items():
        if not name.endswith("qkv.bias"):  # a bias of keys has no gradient but rounding, which AdamW magnifies
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    files = [{path.name for path in (folder / "model").iterdir()} for folder in (two, one.folder)]
    assert files[0] == files[1]
    assert type(AutoModelForCausalLM.from_pretrained(two / "model")).__name__ == "NormFreeForCausalLM"


@pytest.mark.slow
def test_kills_and_signals_cost_no_bit(sharded: Command, two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two" / "single" / NAME
    assert sharded(tmp_path / "two", action="kill", at_step=13)[0] != 0
    assert [path.name for path in checkpoints_in(folder / "checkpoints")] == ["checkpoint-10"]
    shutil.copytree(tmp_path / "two", tmp_path / "four")
    status, output = sharded(tmp_path / "two", action="stop", at_step=15)
    assert status != 0
    assert "stopped by signal 15 and saved" in output
    assert read_run(folder).status == "interrupted"
    assert sharded(tmp_path / "two")[0] == 0
    assert [session["from_step"] for session in read_run(folder).facts["sessions"]] == [0, 10, 16]
    check_equal_runs(folder, two)
    status, output = sharded(tmp_path / "four", processes=4)  # another number of processes
    assert status == 0, output
    assert "processes was 2, now 4" in output
    check_close_runs(read_run(tmp_path / "four" / "single" / NAME), read_run(two))


@pytest.mark.slow
def test_bf16_with_checkpointing_skips_a_step_of_nan(sharded: Command, words, cache: Path, tmp_path: Path) -> None:
    """With norms, whose weights stay in fp32."""
    more = ["variant=sm-ln-g", "train.steps=8", "train.precision=bf16", "train.gradient_checkpointing=true"]
    more.append("train.on_nonfinite=skip:1")
    status, output = sharded(tmp_path / "two", *more, action="nan", at_step=5)
    assert status == 0, output
    run = read_run(tmp_path / "two" / "single" / "sm-ln-g-seed0")
    (skipped,) = run.facts["skipped_steps"]
    assert (skipped["step"], skipped["kind"]) == (6, "gradient")
    assert skipped["module"] in weights(run.folder)
    alone = read_run(train(compose_run([*words, *more]).spec, runs_dir=tmp_path / "one", cache=cache, progress=False))
    assert losses(run)[:5] == pytest.approx(losses(alone)[:5], rel=5e-3)
    assert all(torch.isfinite(value).all() for value in weights(run.folder).values())


@pytest.mark.slow
def test_sharded_steps_report_a_nan_late(sharded: Command, tmp_path: Path) -> None:
    status, output = sharded(tmp_path, "train.log_every=8", action="ahead", at_step=4)
    run = read_run(tmp_path / "single" / NAME)
    divergence = run.facts["divergence"]
    assert (status, run.status, divergence["step"], divergence["kind"]) == (0, "diverged", 5, "gradient"), output
    assert divergence["module"] != "gradient norm"


@pytest.mark.parametrize("value", ["ddp", "fsdp"])
def test_sharding_with_one_process_is_refused(tiny_spec, value: str) -> None:
    with pytest.raises(ValueError, match=f"train.sharding={value} needs several processes, and this is 1: start it"):
        arguments.check_machine(tiny_spec(f"train.sharding={value}"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.optimizer=muon", "fsdp does not work with train.optimizer=muon: leave that out, or give train"),
        ("probe.measures=[gradients]", "fsdp does not work with probe.measures=gradients"),
        ("train.compile=true", "fsdp does not work with train.compile=true"),
        ("variant=sm-wn-r", "fsdp does not work with model.linear=weight_norm"),
        ("probe.sequences=1", "probe.sequences=1 gives some of the 2 processes nothing to measure: give more"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tiny_spec, word: str, message: str, monkeypatch) -> None:
    monkeypatch.setattr(arguments, "PartialState", lambda: SimpleNamespace(num_processes=2))
    spec: Any = tiny_spec("train.sharding=fsdp", "train.batch_sequences=16", "probe.measures=[heads]", word)
    with pytest.raises(ValueError, match=message):
        arguments.check_machine(spec, torch.device("cpu"))


def test_a_full_disk_of_one_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        error: Any = OSError("No space left on device"), None
        raise CheckpointException("write", {1: error})

    monkeypatch.setattr(sharding.state_dict_saver, "save", fail)
    model = small_model(num_hidden_layers=1)
    with pytest.raises(OSError, match="process 1: No space left on device"):
        sharding.save_shards(tmp_path, model, torch.optim.AdamW(model.parameters()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_moments_come_back_without_a_step_before(tmp_path: Path) -> None:
    """As in a resume, whose optimiser has no state yet; one process, without torch.distributed."""
    models = [small_model(seed=seed, num_hidden_layers=1) for seed in (0, 1)]
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
    for parameter in models[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    sharding.save_shards(tmp_path, models[0], optimizers[0])
    sharding.load_shards(tmp_path, models[1])
    sharding.load_shards(tmp_path, models[1], optimizers[1])
    for theirs, ours in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
        torch.testing.assert_close(optimizers[0].state[theirs], optimizers[1].state[ours], rtol=0, atol=0)


def test_a_checkpoint_of_another_sharding_is_refused(tmp_path: Path) -> None:
    check_sharding(tmp_path, "ddp")
    with pytest.raises(ValueError, match=r"holds the model whole, and train\.sharding=fsdp cannot .*: give .*=none or"):
        check_sharding(tmp_path, "fsdp")
    (tmp_path / "shards").mkdir()
    check_sharding(tmp_path, "fsdp")
    with pytest.raises(ValueError, match=r"model in parts, and train\.sharding=none cannot .*: give .*=fsdp, or tag="):
        check_sharding(tmp_path, "none")
