"""Steps that the host does not wait for, as on a GPU; the CPU's fused AdamW reads `found_inf` too."""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from normfree.store.checkpoints import checkpoints_in
from normfree.store.runs import Run, read_run
from normfree.training import trainer as trainer_module
from normfree.training.signals import InterruptedRunError
from normfree.training.trainer import NormFreeTrainer
from tests.training.runs import Observed, act_in, killed_in_step, same_weights, send_in_step, watch_steps, weights

RARELY = [
    *("train.steps=8", "train.log_every=6", "train.checkpoint_every=100", "train.evaluate_every=100"),
    "probe.every_steps=100",
]
WAITS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__")
"""Methods of a tensor that wait for its device."""


@pytest.fixture
def run_ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return partial(monkeypatch.setattr, trainer_module, "RUNS_AHEAD", ("cpu",))


class Watched(Observed):
    """It also breaks one batch."""

    def __init__(self, broken: Tensor | None = None, kind: str = "") -> None:
        super().__init__()
        self.broken, self.kind = broken, kind
        self._network: Any = None

    def begin(self, trainer: NormFreeTrainer, inputs: dict[str, Any]) -> None:
        self.record(trainer, inputs)
        if trainer.network is not self._network:
            self._network = trainer.network
            self._network.register_forward_pre_hook(self._look, with_kwargs=True)
            self._network.model.layers[1].feed_forward.register_forward_hook(self._break)

    def _look(self, _model: Any, _positional: Any, named: dict[str, Any]) -> None:
        self._is_broken = self.broken is not None and torch.equal(named["input_ids"], self.broken)

    def _break(self, _module: Any, _inputs: Any, output: Tensor) -> Tensor:
        if self._is_broken and self.kind == "activation":
            return output * math.nan
        if self._is_broken and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.nan)
        return output


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Watched], Watched]:
    """`watch(watched)`: of the runs that follow."""

    def install(watched: Watched) -> Watched:
        watch_steps(watched.begin, monkeypatch)
        return watched

    return install


@pytest.fixture
def sound(train_tiny: Callable[..., Run], watch: Callable[[Watched], Watched]) -> tuple[Run, dict[int, Tensor]]:
    """A run that waits in every step, and its batches."""
    watched = watch(Watched())
    return train_tiny(*RARELY, runs="sound"), watched.batches


def test_a_sound_run_is_that_of_a_host_that_waits(train_tiny, sound, run_ahead) -> None:
    run_ahead()
    ahead = train_tiny(*RARELY)
    assert same_weights(weights(ahead.folder), weights(sound[0].folder))
    for name in ("loss", "gradient_norm"):
        assert ahead.series("train", name) == sound[0].series("train", name)


@pytest.mark.parametrize("kind", ["activation", "gradient"])
def test_a_late_report_is_that_of_a_host_that_waits(kind, train_tiny, sound, watch, run_ahead) -> None:
    watch(Watched(sound[1][3], kind))
    waiting = train_tiny(*RARELY, runs="waiting")
    run_ahead()
    watched = watch(Watched(sound[1][3], kind))
    late = train_tiny(*RARELY)
    assert waiting.facts["divergence"] | {"step": 3, "layer": 1, "kind": kind} == waiting.facts["divergence"]
    for fact in ("divergence", "status", "steps_done"):
        assert late.facts[fact] == waiting.facts[fact]
    assert [step for step, _ in late.series("train", "loss")] == [1]
    assert list(watched.states) == [1, 2, 3, 4, 5, 6]
    assert not any(watched.changed_in(step) for step in (3, 4, 5))
    assert all(torch.isfinite(tensor).all() for tensor in watched.states[6])


@pytest.mark.parametrize(
    ("key", "outcome", "steps"), [("train.optimizer=muon", "diverged", 3), ("train.on_nonfinite=skip:1", "finished", 8)]
)
def test_what_needs_the_host_in_a_step_keeps_it(key, outcome, steps, train_tiny, sound, watch, run_ahead) -> None:
    run_ahead()
    watched = watch(Watched(sound[1][3], "activation"))
    run = train_tiny(*RARELY, key)
    assert (run.status, len(watched.states)) == (outcome, steps)
    assert [skipped["step"] for skipped in run.facts["skipped_steps"]] == ([3] if steps == 8 else [])


def test_a_kill_before_the_report_does_not_lose_it(train_tiny, sound, watch, run_ahead) -> None:
    run_ahead()
    words = [*RARELY, "train.checkpoint_every=2"]
    watched = watch(Watched(sound[1][3], "activation"))
    with killed_in_step(3):
        train_tiny(*words)
    assert list(watched.states) == [1, 2, 3]
    run = train_tiny(*words)
    assert (run.status, run.facts["divergence"]["step"], run.facts["resumed"]) == ("diverged", 3, 1)


def test_a_signal_reports_before_it_saves(train_tiny, sound, watch, run_ahead, tiny_folder, monkeypatch) -> None:
    run_ahead()
    watch(Watched(sound[1][3], "activation"))
    send_in_step(3, monkeypatch)
    with pytest.raises(InterruptedRunError, match="diverged"):
        train_tiny(*RARELY)
    run = read_run(tiny_folder)
    assert (run.status, run.facts["divergence"]["step"]) == ("diverged", 3)
    assert not checkpoints_in(tiny_folder / "checkpoints")


def test_no_step_between_lines_waits_for_the_device(train_tiny, run_ahead, monkeypatch) -> None:
    """Token ids are int64, and the loader's own are on the host."""
    step, waits = [0], Counter[int]()

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def wait(tensor: Tensor, *rest: Any, **named: Any) -> Any:
            waits[step[0]] += tensor.dtype != torch.int64
            return original(tensor, *rest, **named)

        return wait

    act_in("training_step", lambda trainer: step.__setitem__(0, trainer.state.global_step + 1), monkeypatch)
    for name in WAITS:
        monkeypatch.setattr(Tensor, name, counted(name))
    train_tiny(*RARELY, runs="waiting")
    assert all(waits[each] == 1 for each in (2, 3, 4, 5)), waits
    waits.clear()
    run_ahead()
    train_tiny(*RARELY)
    assert all(waits[each] == 0 for each in (2, 3, 4, 5)), waits
    assert waits[6] > 0
