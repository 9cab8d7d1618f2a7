"""Which signals end our long commands in good order."""

from __future__ import annotations

import signal


def stopping_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM, and SIGHUP (a closed terminal) unless the caller ignores that one, as nohup does."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]
