"""Many runs: one after another, or in several processes that signals stop together."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from normfree.files import folder_lock
from normfree.spec.compose import Job, compose_runs
from normfree.store.runs import RunWriter, find_runs, read_run
from normfree.training import InterruptedRunError, jobs
from normfree.training.jobs import Launch, progress_table, train_jobs
from tests.machine import wait_for
from tests.training.runs import send_in_step
from tests.training.test_signals import handler


@pytest.fixture
def tiny_jobs(tiny: list[str], cache: Path, tmp_path: Path) -> Callable[..., list[Job]]:
    def build(*words: str) -> list[Job]:
        return compose_runs([*tiny, f"cache_dir={cache}", f"runs_dir={tmp_path}", *words])

    return build


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.setattr(jobs, "usable_cores", lambda: 2)
    return Launch(workers=2)


@pytest.fixture
def work_in_forks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`work_in_forks(function)`: let it take the place of the processes' work."""

    def replace(work: Callable[..., None]) -> None:
        fork = multiprocessing.get_context("fork")
        monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
        monkeypatch.setattr(jobs, "_work", work)

    return replace


def test_a_signal_ends_many_runs(tmp_path: Path, tiny_jobs, monkeypatch) -> None:
    send_in_step(3, monkeypatch)
    with pytest.raises(InterruptedRunError, match="and saved"):
        train_jobs(tiny_jobs("variant=sm-r", "seed=0,1,2"))
    assert [path.parent.name for path in tmp_path.glob("single/*/run.json")] == ["sm-r-seed0"]


@pytest.mark.usefixtures("two_cores")
def test_workers_that_do_not_fit_a_gpu_are_refused(tiny_jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU more of them than cores are allowed."""
    facts = SimpleNamespace(name="Tiny GPU", total_memory=4 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(jobs, "_share", lambda *_: pytest.fail("it began to train"))
    message = r"workers=5: 5 runs of 1\.0 GiB need 5\.\d GiB, and Tiny GPU has 4\.0 .*workers=3"
    with pytest.raises(ValueError, match=message):
        train_jobs(tiny_jobs("seed=0,1,2,3,4"), Launch(workers=5))


def test_the_progress_table_has_a_line_a_run_under_way(tiny_jobs, tmp_path: Path, trained: Path) -> None:
    several = tiny_jobs("variant=sm-r", "seed=0,1,2")
    assert progress_table(several) == "0 of 3 runs are over"
    shutil.copytree(trained, several[0].folder)
    shutil.copytree(trained, several[1].folder)
    RunWriter(several[1].folder, {**read_run(trained).facts, "status": "running", "final": None})
    with folder_lock(several[1].folder):
        title, line = progress_table(several).splitlines()
    assert title == "1 of 3 runs are over"
    assert re.match(r".*sm-r-seed1  running +step +6 of 6  loss \d\.\d+ nats", line)


@pytest.mark.slow
def test_workers_share_runs_and_each_failure_is_tried_once(tmp_path, tiny_jobs, two_cores, monkeypatch, capfd) -> None:
    words = ["variant=sm-r", "seed=0,1"]
    train_jobs([*tiny_jobs(*words, "study=alone")])
    monkeypatch.setattr(jobs, "train", lambda *_, **__: pytest.fail("the workers left a run to this process"))
    shared = [*tiny_jobs(*words, "study=shared"), *tiny_jobs("study=shared", "tag=bad", "model.vocab_size=10")]
    capfd.readouterr()
    with pytest.raises(RuntimeError, match=r"1 of 3 runs failed: sm-ln-g-bad-seed0 \(ValueError: model.vocab_size=10"):
        train_jobs(shared, two_cores)
    lines = capfd.readouterr().err
    assert [lines.count(f"SM+R, seed {seed}, finished") for seed in (0, 1)] == [1, 1]
    assert lines.count("sm-ln-g-bad-seed0 failed") == 1
    alone, together = find_runs(tmp_path / "alone"), find_runs(tmp_path / "shared")
    assert [run.facts["final"] for run in together] == [run.facts["final"] for run in alone]
    assert all(run.facts["command"].startswith("normfree train ") for run in together)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_runs_left_by_dead_workers_are_trained_here(tiny_jobs, two_cores, tmp_path, work_in_forks, caplog) -> None:
    def fail_and_die(jobs: list[Job], taken: Any, failures: Any) -> None:
        failures.put((0, f"{jobs[0].spec.name} (ValueError: no)"))
        os.kill(os.getpid(), signal.SIGKILL)

    work_in_forks(fail_and_die)
    with (
        caplog.at_level("WARNING", logger="normfree"),
        pytest.raises(RuntimeError, match=r"1 of 2 runs failed: sm-ln-g-seed0 \(ValueError: no\)"),
    ):
        train_jobs(tiny_jobs("seed=0,1", "train.threads=null"), two_cores)
    assert caplog.text.count("a process ended with status -9") == 2
    (run,) = find_runs(tmp_path)
    assert (run.seed, run.status, run.facts["environment"]["threads"]) == (1, "finished", 1)
    assert run.facts["command"].startswith("normfree train ")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_every_worker_once(tiny_jobs, two_cores, tmp_path, work_in_forks, number) -> None:
    def count_signals(_jobs: list[Job], numbers: Any, _failures: Any) -> None:
        counted: list[int] = []
        signal.signal(number, lambda number, _: counted.append(number))
        (tmp_path / f"{os.getpid()}.ready").touch()
        wait_for(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
        if numbers.get() == 0:  # in one of the two
            os.kill(os.getppid(), number)
        wait_for(lambda: counted)
        time.sleep(0.5)
        (tmp_path / f"{os.getpid()}.signals").write_text(str(len(counted)))

    def earlier(*_: object) -> None:
        """Harmless where the signal comes too late, and not SIG_IGN, which a test run under nohup has."""

    work_in_forks(count_signals)
    with handler(number, earlier):
        with pytest.raises(InterruptedRunError, match=rf"single was stopped by signal {int(number)}") as stopped:
            train_jobs(tiny_jobs("seed=0,1"), two_cores)
        assert stopped.value.signal_number == number
        assert [path.read_text() for path in tmp_path.glob("*.signals")] == ["1", "1"]
