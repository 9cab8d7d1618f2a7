"""Processes that are killed or interrupted: the real command in a process of its own."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import set_seed

from normfree import compose_run, read_run
from normfree.files import damages
from normfree.model import HEADS
from normfree.store.checkpoints import checkpoints_in
from tests.machine import wait_for
from tests.training.fork_server import PLACES, ForkServer
from tests.training.runs import check_equal_runs, of_every_family, weights

pytestmark = pytest.mark.slow
KILLS = 30


@dataclass
class Command:
    """The command `normfree train` with its own folder of runs."""

    server: ForkServer
    words: list[str]
    runs: Path

    def start(self, *more: str, dies: tuple[int, str] | None = None) -> int:
        self.runs.mkdir(parents=True, exist_ok=True)
        return self.server.start([*self.words, f"runs_dir={self.runs}", *more], self.runs / "errors.txt", dies=dies)

    def finish(self, *more: str) -> None:
        assert self.server.wait(self.start(*more)) == 0, self.errors

    @property
    def folder(self) -> Path:
        return self.runs / "single" / "sm-r-seed0"

    @property
    def checkpoints(self) -> list[Path]:
        return checkpoints_in(self.folder / "checkpoints")

    @property
    def errors(self) -> str:
        return (self.runs / "errors.txt").read_text()

    @property
    def metrics(self) -> str:
        path = self.folder / "metrics.jsonl"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def words(tiny: list[str], cache: Path) -> list[str]:
    return ["train", *tiny, "variant=sm-r", "train.steps=14", f"cache_dir={cache}"]


@pytest.fixture
def command(server: ForkServer, words: list[str], tmp_path: Path) -> Callable[[str], Command]:
    return lambda name: Command(server, words, tmp_path / name)


@pytest.fixture(scope="module")
def whole(server: ForkServer, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody killed."""
    command = Command(server, words, tmp_path_factory.mktemp("whole"))
    command.finish()
    return command.folder


def check_resume(run: Command, whole: Path) -> None:
    assert not any(damages(checkpoint) for checkpoint in run.checkpoints[:2])
    run.finish()
    check_equal_runs(run.folder, whole)


@of_every_family
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_inside_a_save_costs_that_checkpoint_only(place: str, command, whole: Path) -> None:
    run = command("killed")
    assert run.server.wait(run.start(dies=(8, place))) == -signal.SIGKILL
    assert [path.name for path in run.folder.glob("checkpoints/.staging/checkpoint-*")] == ["checkpoint-8"]
    assert [path.name for path in run.checkpoints] == ["checkpoint-6", "checkpoint-4"]
    check_resume(run, whole)
    assert read_run(run.folder).facts["sessions"][-1]["from_step"] == 6


@of_every_family
def test_thirty_kills_lose_nothing(family: str, command, words: list[str], whole: Path) -> None:
    """Wherever they hit; those inside a save are the test above."""
    set_seed(compose_run(words[1:]).spec.seed)
    kind = HEADS[family]
    initial = kind(kind.config_class.from_pretrained(whole / "model")).state_dict()
    assert not any(torch.equal(value, initial[name]) for name, value in weights(whole).items())
    began = time.monotonic()
    command("timed").finish()  # the server has imported everything, and the corpus exists
    duration = time.monotonic() - began
    chance = random.Random(4)
    killed = 0
    for number in range(KILLS):
        run = command(f"killed-{number}")
        process = run.start()
        wait_for(run.folder.exists)
        time.sleep(chance.uniform(0, 0.8) * duration)
        os.kill(process, signal.SIGKILL)
        killed += run.server.wait(process) == -signal.SIGKILL
        check_resume(run, whole)
    assert killed, "every run ended before its kill"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_with_its_status_and_one_line(command, number: signal.Signals) -> None:
    run = command("stopped")
    process = run.start("train.steps=60")
    wait_for(lambda: '"step": 3, "split": "train"' in run.metrics)
    os.kill(process, number)
    assert run.server.wait(process) == 128 + number
    assert f"stopped by signal {int(number)} and saved; the same command resumes" in run.errors
    assert read_run(run.folder).status == "interrupted"
    assert run.checkpoints[0].name == f"checkpoint-{read_run(run.folder).facts['steps_done']}"
