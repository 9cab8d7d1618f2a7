"""The signals that stop a long command cleanly."""

from __future__ import annotations

import os
import signal

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a cluster sends shortly before a job's time limit."""


def stopping_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM, SIGHUP unless nohup ignores it, and in a SLURM job the `WARNINGS` without a handler."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    unhandled = [number for number in WARNINGS if signal.getsignal(number) is signal.SIG_DFL]
    return [signal.SIGINT, signal.SIGTERM, *hangup, *(unhandled if "SLURM_JOB_ID" in os.environ else [])]


def warning_signals() -> list[signal.Signals]:
    """The `WARNINGS` with a Python handler installed, e.g. by submitit."""
    return [number for number in WARNINGS if callable(signal.getsignal(number))]
