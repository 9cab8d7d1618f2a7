"""Gradient norms of blocks as a run records them, against the gradients themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from normfree import Run, compose_run, measure, read_run, train
from normfree.measures import MEASURES
from normfree.training.trainer import NormFreeTrainer
from tests.small_model import small_model
from tests.training.runs import act_in

BEFORE, AFTER = MEASURES["gradients"].gives
WORDS = ["variant=sm-ln-g", "train.max_gradient_norm=0.5"]


def run_of(words: list[str], folder: Path, cache: Path) -> Run:
    spec = compose_run([*words, *WORDS, "probe.measures=[gradients:2]"]).spec
    return read_run(train(spec, runs_dir=folder, cache=cache))


def test_norms_are_those_of_the_gradients_before_and_after_clipping(tmp_path, cache, tiny, monkeypatch) -> None:
    seen: dict[int, list[float]] = {}

    def look(trainer: NormFreeTrainer) -> None:
        for block in trainer.network.model.layers:
            squares = [np.square(parameter.grad.double().numpy()).sum() for parameter in block.parameters()]
            seen.setdefault(trainer.state.global_step + 1, []).append(np.sqrt(sum(squares)))

    act_in("_clip_grad_norm", look, monkeypatch)
    run = run_of(tiny, tmp_path, cache)
    totals = dict(run.series("train", "gradient_norm"))
    before, after = (dict(run.series("probe", name)) for name in (BEFORE, AFTER))
    assert list(before) == list(after) == [2, 4, 6]
    for step, norms in before.items():
        assert norms == pytest.approx(seen[step], rel=1e-6)
        assert totals[step] > 0.5
        assert after[step] == pytest.approx([norm * 0.5 / totals[step] for norm in seen[step]], rel=1e-5)
    assert run.last("final", BEFORE) == before[6]


def test_accumulated_gradients_have_the_norms_of_the_whole_batch(tmp_path: Path, cache: Path, tiny: list[str]) -> None:
    whole = run_of(tiny, tmp_path / "whole", cache)
    parts = run_of([*tiny, "train.micro_batch_sequences=2"], tmp_path / "parts", cache)
    for name in (BEFORE, AFTER):
        for step, norms in whole.series("probe", name):
            assert dict(parts.series("probe", name))[step] == pytest.approx(norms, rel=1e-4)


def test_a_skipped_step_has_no_gradient(tmp_path: Path, cache: Path, tiny: list[str], monkeypatch) -> None:
    def spoil(trainer: NormFreeTrainer) -> None:
        if trainer.state.global_step == 1:
            next(trainer.network.parameters()).grad.fill_(torch.nan)

    act_in("_is_finite", spoil, monkeypatch)
    run = run_of([*tiny, "train.on_nonfinite=skip:1"], tmp_path, cache)
    norms = dict(run.series("probe", BEFORE))
    assert np.isnan(norms[2]).all()
    assert np.isfinite(norms[4]).all()


def test_gradients_outside_training_are_refused() -> None:
    with pytest.raises(ValueError, match="measure gradients: only a training run has it"):
        measure(small_model(), torch.arange(24).view(2, 12), ["heads", "gradients"])
