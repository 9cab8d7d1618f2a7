"""Processes that are killed, interrupted or started twice, at the door: the real command in a process of its own."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from normfree.files import damages
from normfree.spec.compose import compose_run
from normfree.store.checkpoints import checkpoints_in
from normfree.store.runs import read_run
from tests.training.fork_server import PLACES, ForkServer

pytestmark = pytest.mark.slow
KILLS = 30


@dataclass
class Door:
    """The command `normfree train` with its own place for runs."""

    server: ForkServer
    words: list[str]
    runs: Path

    def start(self, *more: str, dies: tuple[int, str] | None = None) -> int:
        self.runs.mkdir(parents=True, exist_ok=True)
        return self.server.start([*self.words, f"runs_dir={self.runs}", *more], self.runs / "errors.txt", dies=dies)

    def finish(self) -> int:
        return self.server.wait(self.start())

    @property
    def folder(self) -> Path:
        return self.runs / "single" / "sm-r-seed0"

    @property
    def staged(self) -> list[Path]:
        return list((self.folder / "checkpoints").glob(".staging/checkpoint-*"))

    @property
    def errors(self) -> str:
        return (self.runs / "errors.txt").read_text()

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def words(tiny: list[str], cache: Path) -> list[str]:
    return ["train", *tiny, "variant=sm-r", "train.steps=14", f"cache_dir={cache}"]


@pytest.fixture
def door(server: ForkServer, words: list[str], tmp_path: Path) -> Callable[[str], Door]:
    return lambda name: Door(server, words, tmp_path / name)


@pytest.fixture(scope="module")
def whole(server: ForkServer, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Door:
    """A run that nobody killed."""
    door = Door(server, words, tmp_path_factory.mktemp("whole"))
    assert door.finish() == 0, door.errors
    return door


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.0005)


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def initial_weights(door: Door) -> dict[str, torch.Tensor]:
    from transformers import set_seed

    from normfree.model import NormFreeConfig, NormFreeForCausalLM

    spec = compose_run(door.words[1:]).spec
    config = NormFreeConfig.from_pretrained(door.folder / "model")
    set_seed(spec.seed)
    return dict(NormFreeForCausalLM(config).state_dict())


def check_resume(run: Door, whole: Door) -> None:
    assert not any(damages(checkpoint) for checkpoint in checkpoints_in(run.folder / "checkpoints")[:2])
    assert run.finish() == 0, run.errors
    assert same(run.weights(), whole.weights())
    assert not read_run(run.folder).metrics.duplicated(["step", "split", "name"]).any()
    assert read_run(run.folder).series("train", "loss") == read_run(whole.folder).series("train", "loss")


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_inside_a_save_costs_that_checkpoint_only(place: str, door: Callable[[str], Door], whole: Door) -> None:
    run = door("killed")
    assert run.server.wait(run.start(dies=(8, place))) == -signal.SIGKILL
    assert [path.name for path in run.staged] == ["checkpoint-8"]
    assert [path.name for path in checkpoints_in(run.folder / "checkpoints")] == ["checkpoint-6", "checkpoint-4"]
    check_resume(run, whole)
    assert read_run(run.folder).facts["sessions"][-1]["from_step"] == 6


def test_thirty_kills_lose_nothing(door: Callable[[str], Door], whole: Door) -> None:
    """Wherever they hit; those inside a save are the test above."""
    expected, initial = whole.weights(), initial_weights(whole)
    assert not any(torch.equal(expected[name], initial[name]) for name in expected)
    began = time.monotonic()
    assert door("timed").finish() == 0  # the server has imported and the corpus is there
    duration = time.monotonic() - began
    chance = random.Random(4)
    killed, with_checkpoints = 0, 0
    for number in range(KILLS):
        run = door(f"killed-{number}")
        process = run.start()
        wait_for(lambda run=run: run.folder.exists())
        time.sleep(chance.uniform(0, 0.8) * duration)
        os.kill(process, signal.SIGKILL)
        killed += run.server.wait(process) == -signal.SIGKILL
        with_checkpoints += bool(checkpoints_in(run.folder / "checkpoints"))
        check_resume(run, whole)
    print(f"{killed} kills, {with_checkpoints} with an older checkpoint, run {duration:.1f} s")
    assert killed, "every run ended before its kill"


def test_a_question_cut_short_ends_the_command_and_the_next_one_has_a_new_server(door: Callable[[str], Door]) -> None:
    """What a test leaves that ran into its time limit."""
    run = door("stuck")
    process = run.start("train.steps=60")
    os.kill(process, signal.SIGSTOP)

    def cut(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGUSR1, cut)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(TimeoutError):
            run.server.wait(process)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    wait_for(lambda: not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE)
    assert door("next").finish() == 0


def test_the_second_process_on_a_run_folder_is_refused_with_the_owner(door: Callable[[str], Door]) -> None:
    run = door("locked")
    first = run.start("train.steps=60")
    wait_for(lambda: (run.folder / "metrics.jsonl").exists())
    os.kill(first, signal.SIGSTOP)
    second = run.server.wait(run.start("train.steps=60"))
    assert second == 1
    assert run.errors.count("\n") == 1 + run.errors.count("glibc keeps")
    assert f"is in use by process {first} on {socket.gethostname()}" in run.errors
    os.kill(first, signal.SIGKILL)
    assert run.server.wait(first) == -signal.SIGKILL
    assert run.server.wait(run.start("train.steps=60")) == 0, run.errors  # a dead owner holds no lock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_with_its_status_and_one_line_that_says_how_to_go_on(
    door: Callable[[str], Door], number: signal.Signals
) -> None:
    run = door("stopped")
    process = run.start("train.steps=60")
    wait_for(lambda: '"step": 3, "split": "train"' in metrics_of(run))
    os.kill(process, number)
    assert run.server.wait(process) == 128 + number
    assert f"stopped by signal {int(number)} and saved; the same command goes on" in run.errors
    assert read_run(run.folder).status == "interrupted"
    newest = checkpoints_in(run.folder / "checkpoints")[0]
    assert newest.name == f"checkpoint-{read_run(run.folder).facts['steps_done']}"


def metrics_of(run: Door) -> str:
    path = run.folder / "metrics.jsonl"
    return path.read_text() if path.exists() else ""
