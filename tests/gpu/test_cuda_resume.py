"""A run on CUDA that breaks half-way and goes on from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from normfree.spec.run import RunSpec
from normfree.store.runs import Run, read_run
from normfree.training import train
from normfree.training.trainer import NormFreeTrainer

STEPS = 12
TRAINING_STEP = NormFreeTrainer.training_step


class PowerCutError(Exception):
    """What ends the first half."""


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_has_the_losses_of_the_whole(
    precision: str,
    dropout: float,
    tiny_spec: Callable[..., RunSpec],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dropout the masks come from CUDA's own random state, which the checkpoint has to hold too."""
    spec = tiny_spec(
        f"train.steps={STEPS}",
        f"train.precision={precision}",
        "train.checkpoint_every=4",
        f"model.residual_dropout={dropout}",
        f"model.attention_dropout={dropout}",
    )
    whole = read_run(train(spec, runs_dir=tmp_path / "whole", cache=cache, progress=False))
    scales: dict[int, float] = {}

    def failing(trainer: NormFreeTrainer, model: Any, inputs: Any, items: Any = None) -> torch.Tensor:
        step = trainer.state.global_step + 1
        if trainer.accelerator.scaler is not None:
            scales[step] = trainer.accelerator.scaler.get_scale()
        if step == 7 and not broken:
            broken.append(step)
            raise PowerCutError
        return TRAINING_STEP(trainer, model, inputs, items)

    broken: list[int] = []
    monkeypatch.setattr(NormFreeTrainer, "training_step", failing)
    with pytest.raises(PowerCutError):
        train(spec, runs_dir=tmp_path / "broken", cache=cache, progress=False)
    resumed = read_run(train(spec, runs_dir=tmp_path / "broken", cache=cache, progress=False))
    assert (resumed.status, resumed.facts["resumed"]) == ("finished", 1)
    assert resumed.facts["sessions"][1]["from_step"] == 4
    assert len(set(scales.values())) < 2 or scales[5] == scales[6], f"the scaler began anew: {scales}"

    def curve(run: Run) -> list[float]:
        return [value for _, value in run.series("train", "loss")]

    assert [step for step, _ in resumed.series("train", "loss")] == list(range(1, STEPS + 1))
    assert curve(resumed) == pytest.approx(curve(whole), rel=1e-3)
    assert resumed.perplexity == pytest.approx(whole.perplexity, rel=1e-3)
