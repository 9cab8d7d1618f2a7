"""Signals at an exact place of a run, sent by the process to itself."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from normfree.training.trainer import NormFreeTrainer


def terminate_in_step(
    step: int, monkeypatch: pytest.MonkeyPatch, *, with_signal: signal.Signals = signal.SIGTERM
) -> None:
    """Send a signal within the training step after `step`."""
    original = NormFreeTrainer.training_step

    def interrupted(trainer: NormFreeTrainer, *rest: Any, **named: Any) -> Any:
        if trainer.state.global_step == step:
            os.kill(os.getpid(), with_signal)
        return original(trainer, *rest, **named)

    monkeypatch.setattr(NormFreeTrainer, "training_step", interrupted)
