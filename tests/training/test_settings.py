"""Every setting of the optimiser and every seed reaches the training: with another value other numbers come out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normfree.model.modeling import FeedForward
from normfree.spec.compose import compose_run
from normfree.store.runs import Run, read_run
from normfree.training import train

Trained = Callable[..., Run]
SHORT = ["train.steps=4", "train.evaluate_every=100", "train.checkpoint_every=100", "train.warmup_share=0"]
SMALL = ["probe.every_steps=100", "probe.sequences=1", "probe.final_sequences=1", "train.evaluation_sequences=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: list[str], cache: Path) -> Trained:
    """`trained(*overrides)`: a run of four steps."""

    def run(*overrides: str) -> Run:
        spec = compose_run([*tiny, *SHORT, *SMALL, "variant=sm-r", *overrides]).spec
        return read_run(train(spec, runs_dir=tmp_path_factory.mktemp("runs"), cache=cache, progress=False))

    return run


@pytest.fixture(scope="module")
def base(trained: Trained) -> Run:
    return trained()


def difference(some: Run, other: Run, split: str = "train") -> float:
    """The largest relative difference of a loss."""
    pairs = zip(some.series(split, "loss"), other.series(split, "loss"), strict=True)
    return max(abs(one / two - 1) for (_, one), (_, two) in pairs)


@pytest.mark.parametrize(
    "setting",
    [
        "seed=1",
        "data_seed=1",
        "train.weight_decay=9",
        "train.adam_beta1=0.5",
        "train.adam_beta2=0.5",
        "train.adam_epsilon=1",
        "train.max_gradient_norm=0.01",
    ],
)
def test_another_value_gives_other_losses(setting: str, base: Run, trained: Trained) -> None:
    assert difference(base, trained(setting)) > 1e-6


def test_the_same_values_give_the_same_losses(base: Run, trained: Trained) -> None:
    again = trained()
    assert difference(base, again) == difference(base, again, "validation") == 0


def test_evaluation_sequences_decide_what_is_validated_and_change_no_step(base: Run, trained: Trained) -> None:
    more = trained("train.evaluation_sequences=8")
    assert difference(base, more, "validation") > 1e-6
    assert difference(base, more) == 0


def test_gradient_checkpointing_repeats_the_forward_pass_and_changes_no_loss(
    base: Run, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = FeedForward.forward, []

    def counted(layer: FeedForward, *values: Any) -> Any:
        calls.append(layer.training)
        return forward(layer, *values)

    monkeypatch.setattr(FeedForward, "forward", counted)
    with_repeats = trained("train.gradient_checkpointing=true")
    assert sum(calls) == 2 * 2 * 4  # layers, steps
    assert difference(base, with_repeats) < 1e-6
