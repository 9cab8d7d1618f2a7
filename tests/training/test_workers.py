"""Processes side by side: their ends, and signals that are handed on once."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from normfree.training.workers import StoppedError, run_side_by_side

COUNTS_SIGNALS = """
import os, signal, sys, time
signal.alarm(60)  # in a session of its own, it outlives a test that is cut short
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
open(os.path.join(sys.argv[1], f"{os.getpid()}.ready"), "w").close()
while not seen:
    time.sleep(0.02)
time.sleep(0.5)
open(os.path.join(sys.argv[1], f"{os.getpid()}.signals"), "w").write(str(len(seen)))
"""


def wait_until_ready(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.ready")):
        assert time.monotonic() < deadline, "the process never began"
        time.sleep(0.02)


def test_every_process_gets_the_environment_and_its_status_comes_back() -> None:
    command = [sys.executable, "-c", "import os, sys; sys.exit(int(os.environ['STATUS']))"]
    assert run_side_by_side(command, count=3, environment={"STATUS": "7"}) == [7, 7, 7]


def test_processes_see_no_terminal_and_their_lines_are_passed_on() -> None:
    says = "import sys; print('a terminal:', sys.stderr.isatty(), file=sys.stderr)"
    code = "import sys; from normfree.training.workers import run_side_by_side as run; "
    code += f"run([sys.executable, '-c', {says!r}], count=2, environment={{}})"
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    assert os.read(ours, 1000).decode().split("\r\n") == ["a terminal: False", "a terminal: False", ""]
    os.close(ours)


def test_a_signal_that_nohup_ignores_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGHUP))
    timer.start()
    try:
        sleeps = [sys.executable, "-c", "import time; time.sleep(1)"]
        assert run_side_by_side(sleeps, count=2, environment={}) == [0, 0]
    finally:
        timer.join()  # a signal after the next line would be deadly
        signal.signal(signal.SIGHUP, before)


def test_when_one_cannot_start_the_others_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def once(*words: Any, **named: Any) -> Any:
        monkeypatch.setattr(subprocess, "Popen", fails)
        process = start(*words, **named)
        wait_until_ready(tmp_path)
        return process

    def fails(*_words: Any, **_named: Any) -> Any:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", once)
    with pytest.raises(OSError, match="no more processes"):
        run_side_by_side([sys.executable, "-c", COUNTS_SIGNALS, str(tmp_path)], count=2, environment={})
    assert [path.read_text() for path in tmp_path.glob("*.signals")] == ["1"]


def test_a_signal_while_a_process_is_being_started_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def interrupted(*words: Any, **named: Any) -> Any:
        process = start(*words, **named)
        wait_until_ready(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(StoppedError):
        run_side_by_side([sys.executable, "-c", COUNTS_SIGNALS, str(tmp_path)], count=2, environment={})
    assert [path.read_text() for path in tmp_path.glob("*.signals")] == ["1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_every_process_once(tmp_path: Path, number: int) -> None:
    def before(*_: object) -> None:
        """Harmless where the signal comes too late, and not SIG_IGN, which a test run under nohup has."""

    outer = signal.signal(number, before)
    over = threading.Event()

    def stop_when_ready() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not over.wait(0.02):
            if len(list(tmp_path.glob("*.ready"))) == 2:
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=stop_when_ready, daemon=True)
    thread.start()
    try:
        with pytest.raises(StoppedError) as stopped:
            run_side_by_side([sys.executable, "-c", COUNTS_SIGNALS, str(tmp_path)], count=2, environment={})
        assert stopped.value.signal_number == number
        assert [path.read_text() for path in tmp_path.glob("*.signals")] == ["1", "1"]
        assert signal.getsignal(number) is before
    finally:
        over.set()
        thread.join()  # a signal after the next line would be deadly
        signal.signal(number, outer)
