"""Helpers of the training tests: compare runs, act inside a step or watch it, damage a file."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from normfree.files import damages
from normfree.store.checkpoints import checkpoints_in
from normfree.store.runs import Run, read_run
from normfree.training.trainer import NormFreeTrainer

DAMAGES = ("flip", "cut", "remove")
of_every_family = pytest.mark.parametrize("family", ["decoder", "vision", "encoder_decoder"], indirect=True)
"""A test of `tiny` runs for each family."""
TRAINING_STEP = NormFreeTrainer.training_step


def damage(path: Path, how: str) -> None:
    """Flip one bit in the middle of a file, cut its last two bytes, or remove it."""
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "remove":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-2])  # more than the newline at the end
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def losses(run: Run) -> list[float]:
    return [loss for _, loss in run.series("train", "loss")]


def same_weights(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def check_equal_runs(folder: Path, whole: Path) -> None:
    """A resumed run ends with the weights of the uninterrupted one and holds each of its measurements once."""
    run, expected = read_run(folder), read_run(whole)
    assert run.status == "finished"
    assert same_weights(weights(folder), weights(whole))
    columns = ["step", "split", "name"]
    assert sorted(run.metrics[columns].values.tolist()) == sorted(expected.metrics[columns].values.tolist())
    for split, name in (("train", "loss"), ("probe", "entropy_nats"), ("validation", "loss")):
        assert run.series(split, name) == expected.series(split, name)
    assert not any(damages(checkpoint) for checkpoint in checkpoints_in(folder / "checkpoints"))
    assert not (folder / "checkpoints" / ".staging").exists()


class Observed:
    """Weights and Adam's moments at the beginning of each step, and its batch."""

    def __init__(self) -> None:
        self.states: dict[int, list[torch.Tensor]] = {}
        self.batches: dict[int, torch.Tensor] = {}

    def record(self, trainer: NormFreeTrainer, inputs: dict[str, Any]) -> int:
        """Returns the step, counted from 1."""
        step = trainer.state.global_step + 1
        self.states[step] = [tensor.detach().clone() for tensor in (*trainer.network.parameters(), *moments(trainer))]
        self.batches[step] = inputs.get("input_ids", inputs.get("pixel_values")).clone()
        return step

    def changed_in(self, step: int) -> bool:
        """True if the step changed a weight or a moment."""
        before, after = self.states[step], self.states[step + 1]
        return not all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def moments(trainer: NormFreeTrainer) -> list[torch.Tensor]:
    return [value for state in trainer.optimizer.state_dict().get("state", {}).values() for value in state.values()]


def watch_steps(begin: Callable[[NormFreeTrainer, dict[str, Any]], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `begin(trainer, inputs)` before each pass and what it returns after it, in place of an earlier `begin`."""

    def watching(trainer: NormFreeTrainer, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        end = begin(trainer, inputs)
        try:
            return TRAINING_STEP(trainer, model, inputs, *rest)
        finally:
            if end is not None:
                end()

    monkeypatch.setattr(NormFreeTrainer, "training_step", watching)


def act_in(method: str, action: Callable[[NormFreeTrainer], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `action(trainer)` before each call of a method of the trainer."""
    original = getattr(NormFreeTrainer, method)

    def acting(trainer: NormFreeTrainer, *rest: Any, **named: Any) -> Any:
        action(trainer)
        return original(trainer, *rest, **named)

    monkeypatch.setattr(NormFreeTrainer, method, acting)


def break_in_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise ConnectionError before the training step after `step`, as a lost machine would end the run."""

    def fail(trainer: NormFreeTrainer) -> None:
        if trainer.state.global_step == step:
            raise ConnectionError("killed")

    act_in("training_step", fail, monkeypatch)


@contextmanager
def killed_in_step(step: int) -> Iterator[None]:
    """Break a run as `break_in_step` does, and expect it."""
    with pytest.MonkeyPatch.context() as patch:
        break_in_step(step, patch)
        with pytest.raises(ConnectionError, match="killed"):
            yield


def send_in_step(step: int, monkeypatch: pytest.MonkeyPatch, *numbers: signal.Signals) -> None:
    """Send signals, SIGTERM by default, to this process within the training step after `step`."""

    def send(trainer: NormFreeTrainer) -> None:
        for number in (numbers or (signal.SIGTERM,)) if trainer.state.global_step == step else ():
            os.kill(os.getpid(), number)

    act_in("training_step", send, monkeypatch)
