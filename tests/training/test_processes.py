"""Several processes of one run: two ranks on the CPU, and trackers."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from normfree.store.runs import RunWriter, read_run
from normfree.training.record import wandb_run
from tests.training.runs import losses
from tests.training.test_objectives import BAND, TAPER, TARGET

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@contextmanager
def started(words: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A Python command, killed at the end with all that it started: torchrun gives each rank its own session."""
    with (folder / "output").open("w") as output:
        process = subprocess.Popen([sys.executable, *words], cwd=folder, stdout=output, stderr=output, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.wait(timeout=60)


def run_command(words: list[str], folder: Path) -> str:
    """Run a Python command and return its output."""
    with started(words, folder) as process:
        status = process.wait(timeout=150)
    output = (folder / "output").read_text()
    assert status == 0, output[-3000:]
    return output


def test_the_wandb_project_is_normfree_unless_named(tiny_spec, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None, init=lambda **options: options["project"]))
    writer = SimpleNamespace(facts={"sessions": [{"began": "today"}]})
    record = SimpleNamespace(
        writer=writer, spec=tiny_spec("train.trackers=[wandb]"), corpus=SimpleNamespace(fingerprint="")
    )
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert wandb_run(record) == "normfree"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert wandb_run(record) == "mine"


PRINTS_THREADS = """
import glob, sys
from normfree.cli.main import main

status = main(sys.argv[1:])
print([open(name).read() for name in glob.glob("/proc/self/task/*/comm")])
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant", "words"),
    [
        ("decoder", "sm-ln-g", ["train.max_gradient_norm=0.5", "probe.measures=[heads,slopes,gradients]"]),
        ("decoder", "sm-taper-sn-r", [*TAPER, *TARGET]),
        ("decoder", "sm-r", BAND),
        ("decoder", "sm-r", ["train.optimizer=muon"]),
        ("vision", "sm-r", TARGET),
        ("encoder_decoder", "sm-r", []),
    ],
    ids=["gradients", "state", "band", "muon", "vision", "encoder_decoder"],
    indirect=["family"],
)
def test_two_processes_train_the_model_of_one(tiny: list[str], cache: Path, tmp_path: Path, variant, words) -> None:
    """Only the first writes, and both resume from its checkpoint."""
    words = ["train.micro_batch_sequences=4", f"cache_dir={cache}", *words]
    words = ["-m", "normfree", "train", *tiny, f"variant={variant}", *words]
    run_command([*words, "runs_dir=one"], tmp_path)
    output = run_command([*TORCHRUN, *words, "runs_dir=two"], tmp_path)
    for once in ("training on cpu, 2 processes, 1 thread each, precision fp32", "measuring the trained model"):
        assert output.count(f"{variant}-seed0: {once}") == 1
    assert "find_unused_parameters" not in output  # which each step would pay for
    one, two = (read_run(tmp_path / name / "single" / f"{variant}-seed0") for name in ("one", "two"))
    assert two.perplexity == pytest.approx(one.perplexity, rel=1e-4)
    assert one.facts["final"]["tokens"] == two.facts["final"]["tokens"]
    entropies = [torch.tensor(run.last("final", "entropy_nats")) for run in (one, two)]
    torch.testing.assert_close(*entropies, atol=1e-4, rtol=0)
    assert one.last("final", "rows") == two.last("final", "rows")
    for name in one.quantities:
        if of_both := [run.series("probe", name)[:1] for run in (one, two) if run.series("probe", name)]:
            first, second = (values for [(_, values)] in of_both)  # later weights differ by rounding
            np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-6, err_msg=name)
    assert len(losses(one)) == 6
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)
    (two.folder / "run.json").unlink()
    shutil.rmtree(two.folder / "checkpoints" / "checkpoint-6")
    (tmp_path / "print_threads.py").write_text(PRINTS_THREADS)
    output = run_command([*TORCHRUN, "print_threads.py", *words[2:], "runs_dir=two"], tmp_path)
    assert "gloo" not in output  # such a thread may abort the interpreter's end
    again = read_run(two.folder)
    assert two.facts["command"].startswith("torchrun --nproc_per_node 2 -m normfree train ")
    assert (one.facts["environment"]["processes"], again.facts["environment"]["processes"]) == (1, 2)
    assert (again.status, again.facts["sessions"][0]["from_step"], again.perplexity) == ("finished", 4, two.perplexity)


SAVES_ITS_FIRST_MASK = """
import os, sys, torch
from normfree.cli.main import main

masks, forward = [], torch.nn.Dropout.forward

def recording(self, values):
    dropped = forward(self, values)
    if self.training and self.p:
        masks.append(dropped != 0)
    return dropped

torch.nn.Dropout.forward = recording
main(["train", *sys.argv[1:]])
torch.save(masks[0], f"mask{os.environ['RANK']}.pt")
"""


@pytest.mark.slow
def test_two_processes_drop_different_features(tiny: list[str], cache: Path, tmp_path: Path) -> None:
    (tmp_path / "recording.py").write_text(SAVES_ITS_FIRST_MASK)
    words = [*tiny, "variant=sm-r", "train.micro_batch_sequences=4", "model.embedding_dropout=0.5", "train.steps=1"]
    run_command([*TORCHRUN, "recording.py", *words, f"cache_dir={cache}"], tmp_path)
    first, second = (torch.load(tmp_path / f"mask{rank}.pt") for rank in (0, 1))
    assert first.shape == second.shape
    assert (first == second).float().mean().item() == pytest.approx(0.5, abs=0.1)  # as independent masks agree


@pytest.mark.slow
def test_a_resume_continues_the_same_wandb_run(tiny: list[str], cache: Path, tmp_path: Path, monkeypatch) -> None:
    """And each run of a sweep has its own."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["-m", "normfree", "train", *tiny, "variant=sm-r", "train.trackers=[wandb]", f"cache_dir={cache}"]
    run_command([*words, "-m", "seed=0,1"], tmp_path)

    def ids() -> list[str]:
        return [path.name.rpartition("-")[2] for path in sorted((tmp_path / "wandb").glob("offline-run-*"))]

    first, second = ids()
    assert first != second
    run = read_run(tmp_path / "runs" / "single" / "sm-r-seed0")
    RunWriter(run.folder, run.facts).update(status="interrupted")  # as a signal in its last evaluation leaves it
    run_command(words, tmp_path)
    assert ids() == [first, second, first]


@pytest.mark.slow
def test_trackers_get_losses_and_perplexity_offline(tiny: list[str], cache: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["train", *tiny, "variant=sm-r", "train.trackers=[tensorboard,wandb,trackio]", f"cache_dir={cache}"]
    run_command(["-m", "normfree", *words], tmp_path)
    run = read_run(tmp_path / "runs" / "single" / "sm-r-seed0")
    assert run.status == "finished"
    assert list(tmp_path.rglob("*.wandb"))
    assert list((tmp_path / "trackio").rglob("*.db"))
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("eval/final_perplexity")] == pytest.approx([run.perplexity])
    for name, recorded in (("eval/perplexity", ("validation", "perplexity")), ("train/loss", ("train", "loss"))):
        series = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in series] == [step for step, _ in run.series(*recorded)]
        assert [value for _, value in series] == pytest.approx([value for _, value in run.series(*recorded)])
