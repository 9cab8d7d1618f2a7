"""The same command in several processes at once, stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import IO, Any

from normfree.training.signals import stopping_signals


class StoppedError(Exception):
    """A signal ended all processes."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}; the same command goes on from the newest checkpoints")
        self.signal_number = signal_number


def run_side_by_side(
    command: Sequence[str], *, count: int, environment: dict[str, str], standard_input: str = ""
) -> list[int]:
    """Start `count` processes of one command, each with that text on its standard input; returns their exit statuses.

    Standard output is dropped. Standard error is passed on line by line: at a terminal the processes would draw
    progress bars over each other. Stopping signals (SIGHUP as SIGTERM) are passed on once: the processes have sessions
    of their own, since a Ctrl-C that reached them twice would make a run leave without a checkpoint.

    Raises StoppedError after such a signal, once every process has ended; OSError when one could not be started, after
    the others were stopped.
    """
    received: list[int] = []
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, hand_on) for number in stopping_signals()}
    try:
        for _ in range(count):
            if received:
                break
            process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            processes.append(process)
            if received:  # while it was being started, so not handed on to it
                process.send_signal(signal.SIGTERM)
            readers.append(threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True))
            readers[-1].start()
            _write_all(process.stdin, standard_input)
        statuses = [process.wait() for process in processes]
        for reader in readers:
            reader.join(timeout=5)
    except OSError:
        hand_on(signal.SIGTERM, None)
        for process in processes:
            process.wait()
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise StoppedError(received[0])
    return statuses


def _write_all(pipe: IO[str] | None, text: str) -> None:
    assert pipe is not None
    with suppress(BrokenPipeError), pipe:  # a process that has ended says why by its exit status
        pipe.write(text)


def _pass_on(lines: IO[str]) -> None:
    with lines:
        sys.stderr.writelines(lines)
