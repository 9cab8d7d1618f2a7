"""Every setting of the optimiser and every seed changes the training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normfree import Run, compose_run, read_run, train
from normfree.model.blocks import FeedForward

SHORT = ["train.steps=4", "train.evaluate_every=100", "train.checkpoint_every=100", "train.warmup_share=0"]
SMALL = ["probe.every_steps=100", "probe.sequences=1", "probe.final_sequences=1", "train.evaluation_sequences=2"]


@pytest.fixture(scope="module")
def train_short(tmp_path_factory: pytest.TempPathFactory, tiny: list[str], cache: Path) -> Callable[..., Run]:
    """`train_short(*overrides)`: a run of four steps."""

    def run(*overrides: str) -> Run:
        spec = compose_run([*tiny, *SHORT, *SMALL, "variant=sm-r", *overrides]).spec
        return read_run(train(spec, runs_dir=tmp_path_factory.mktemp("runs"), cache=cache, progress=False))

    return run


@pytest.fixture(scope="module")
def base(train_short) -> Run:
    return train_short()


def difference(some: Run, other: Run, split: str = "train") -> float:
    """The largest relative difference of a loss."""
    pairs = zip(some.series(split, "loss"), other.series(split, "loss"), strict=True)
    return max(abs(first / second - 1) for (_, first), (_, second) in pairs)


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
def test_another_value_gives_other_losses(setting: str, base: Run, train_short) -> None:
    assert difference(base, train_short(setting)) > 1e-6


def test_evaluation_sequences_change_validation_but_no_step(base: Run, train_short) -> None:
    more = train_short("train.evaluation_sequences=8")
    assert difference(base, more, "validation") > 1e-6
    assert difference(base, more) == 0


def test_gradient_checkpointing_repeats_forward_and_changes_no_loss(base: Run, train_short, monkeypatch) -> None:
    forward, calls = FeedForward.forward, []

    def counted(layer: FeedForward, *values: Any) -> Any:
        calls.append(layer.training)
        return forward(layer, *values)

    monkeypatch.setattr(FeedForward, "forward", counted)
    with_repeats = train_short("train.gradient_checkpointing=true")
    assert sum(calls) == 2 * 2 * 4  # layers, steps
    assert difference(base, with_repeats) < 1e-6
