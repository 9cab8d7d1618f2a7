"""Which signals end our long commands in good order."""

from __future__ import annotations

import os
import signal

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What a cluster is asked to send some time before a job's end."""


def stopping_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM, SIGHUP (a closed terminal) unless the caller ignores that one, as nohup does, and in a SLURM job
    those of `WARNINGS` that would end the process at once."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    deadly = [number for number in WARNINGS if signal.getsignal(number) is signal.SIG_DFL]
    return [signal.SIGINT, signal.SIGTERM, *hangup, *(deadly if "SLURM_JOB_ID" in os.environ else [])]


def warning_signals() -> list[signal.Signals]:
    """Those of `WARNINGS` to which a handler in Python listens, as that of a cluster's launcher."""
    return [number for number in WARNINGS if callable(signal.getsignal(number))]


def pass_on(number: int) -> None:
    """Let the listener of a warning signal act, where it is one; whatever the listener raises is raised."""
    if number in warning_signals():
        signal.raise_signal(number)
