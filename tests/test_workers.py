"""Processes side by side: their ends, and signals that are handed on once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from normfree.workers import StoppedError, run_side_by_side

COUNTS_SIGNALS = """
import os, signal, sys, time
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
open(os.path.join(sys.argv[1], f"{os.getpid()}.ready"), "w").close()
while not seen:
    time.sleep(0.02)
time.sleep(0.5)
open(os.path.join(sys.argv[1], f"{os.getpid()}.signals"), "w").write(str(len(seen)))
"""


def test_every_process_gets_the_environment_and_its_status_comes_back() -> None:
    command = [sys.executable, "-c", "import os, sys; sys.exit(int(os.environ['STATUS']))"]
    assert run_side_by_side(command, count=3, environment={"STATUS": "7"}) == [7, 7, 7]


def test_a_signal_reaches_every_process_once_and_all_are_waited_for(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def stop_when_ready() -> None:
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_ready).start()
    with pytest.raises(StoppedError) as stopped:
        run_side_by_side([sys.executable, "-c", COUNTS_SIGNALS, str(tmp_path)], count=2, environment={})
    assert stopped.value.signal_number == signal.SIGTERM
    assert [path.read_text() for path in tmp_path.glob("*.signals")] == ["1", "1"]
    assert signal.getsignal(signal.SIGTERM) is before
