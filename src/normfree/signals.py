"""Which signals end our long commands in good order."""

from __future__ import annotations

import signal


def stopping_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM, and SIGHUP (a closed terminal) unless the caller ignores that one, as nohup does."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def warning_signals() -> list[signal.Signals]:
    """SIGUSR1 and SIGUSR2 where a handler in Python listens, as that of a cluster's launcher: an end is near."""
    return [number for number in (signal.SIGUSR1, signal.SIGUSR2) if callable(signal.getsignal(number))]


def pass_on(number: int) -> None:
    """Let the listener of a warning signal act, where it is one; whatever the listener raises is raised."""
    if number in warning_signals():
        signal.raise_signal(number)
