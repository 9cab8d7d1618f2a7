"""A run on CUDA that breaks half-way and goes on from its checkpoint."""

import pytest

from normfree.training.trainer import NormFreeTrainer
from tests.training.runs import act_in, break_in_step


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_has_the_losses_of_the_whole(precision, dropout, train_tiny, monkeypatch) -> None:
    """With dropout the masks come from CUDA's own random state, which the checkpoint has to hold too."""
    words = ["train.steps=12", f"train.precision={precision}", "train.checkpoint_every=4"]
    words += [f"model.residual_dropout={dropout}", f"model.attention_dropout={dropout}"]
    whole = train_tiny(*words, runs="whole")
    scales: dict[int, float] = {}

    def watch(trainer: NormFreeTrainer) -> None:
        if trainer.accelerator.scaler is not None:
            scales[trainer.state.global_step] = trainer.accelerator.scaler.get_scale()

    act_in("training_step", watch, monkeypatch)
    with monkeypatch.context() as patch:
        break_in_step(6, patch)
        with pytest.raises(ConnectionError):
            train_tiny(*words)
    resumed = train_tiny(*words)
    assert (resumed.status, resumed.facts["resumed"]) == ("finished", 1)
    assert resumed.facts["sessions"][1]["from_step"] == 4
    assert len(set(scales.values())) < 2 or scales[4] == scales[5], f"the scaler began anew: {scales}"
    (steps, losses), (_, expected) = (zip(*run.series("train", "loss"), strict=True) for run in (resumed, whole))
    assert steps == tuple(range(1, 13))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert resumed.perplexity == pytest.approx(whole.perplexity, rel=1e-3)
