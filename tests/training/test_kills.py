"""Processes that are killed, interrupted or started twice, at the door: the real command in a process of its own."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from normfree.compose import compose_run
from normfree.records import read_run
from normfree.training.checkpoints import checkpoints_in, flaws
from tests.training.fork_server import ForkServer

pytestmark = pytest.mark.slow
KILLS = 30
INSIDE_A_SAVE = 16
"""How many of them wait for a save to begin; at least ten must be seen to have hit one."""


@dataclass
class Door:
    """The command `normfree train` with its own place for runs."""

    server: ForkServer
    words: list[str]
    runs: Path

    def start(self, *more: str) -> int:
        self.runs.mkdir(parents=True, exist_ok=True)
        return self.server.start([*self.words, f"runs_dir={self.runs}", *more], self.runs / "errors.txt")

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


@pytest.fixture
def door(server: ForkServer, tiny: list[str], cache: Path, tmp_path: Path) -> Callable[[str], Door]:
    words = ["train", *tiny, "variant=sm-r", "train.steps=14", f"cache_dir={cache}"]
    return lambda name: Door(server, words, tmp_path / name)


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


def test_thirty_kills_lose_nothing(door: Callable[[str], Door]) -> None:
    """After a SIGKILL the folder .staging/checkpoint-N exists exactly if Trainer was writing it or it was being hashed
    and renamed: that trace proves a kill inside a save."""
    whole = door("whole")
    assert door("warm").finish() == 0  # the server has imported and the corpus is there
    began = time.monotonic()
    assert whole.finish() == 0, whole.errors
    duration = time.monotonic() - began
    expected = whole.weights()
    initial = initial_weights(whole)
    assert not any(torch.equal(expected[name], initial[name]) for name in expected)
    chance = random.Random(4)
    killed, inside, with_checkpoints, number = 0, 0, 0, -1
    while killed < KILLS:  # a run that ended before its kill does not count
        number += 1
        assert number < 2 * KILLS
        run = door(f"killed-{number}")
        process = run.start()
        if number < INSIDE_A_SAVE:
            save = chance.randrange(1, 7) * 2
            wait_for(lambda run=run, save=save: [p for p in run.staged if p.name == f"checkpoint-{save}"])
            time.sleep(chance.uniform(0, 0.02))
        else:
            wait_for(lambda run=run: run.folder.exists())
            time.sleep(chance.uniform(0, 0.8) * duration)
        os.kill(process, signal.SIGKILL)
        killed += run.server.wait(process) == -signal.SIGKILL
        inside += bool(run.staged)
        with_checkpoints += bool(checkpoints_in(run.folder / "checkpoints"))
        assert not any(flaws(checkpoint) for checkpoint in checkpoints_in(run.folder / "checkpoints")[:2])
        assert run.finish() == 0, run.errors
        assert same(run.weights(), expected), f"kill {number}"
        assert not read_run(run.folder).metrics.duplicated(["step", "split", "name"]).any()
        assert read_run(run.folder).series("train", "loss") == read_run(whole.folder).series("train", "loss")
    print(f"{KILLS} kills, {inside} inside a save, {with_checkpoints} with an older checkpoint, run {duration:.1f} s")
    assert inside >= 10
    assert with_checkpoints >= 15


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
