from __future__ import annotations

import pytest
import torch
from torch import nn

from normfree import measure
from normfree.measures.residual import Residual
from tests.entropy.families import tiny_model

IDS = torch.arange(48).view(4, 12) % 20


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_stream_is_that_of_the_models_own_hidden_states(family: str) -> None:
    model = tiny_model(family)
    measured = measure(model, IDS, "residual", batch=3)
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states[:-1]  # the last is behind the blocks
    expected = [states.double().square().mean().sqrt().item() for states in hidden]
    assert measured["residual_rms"] == pytest.approx(expected, rel=1e-6)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no list of None blocks found in Linear"):
        Residual(nn.Linear(2, 2))
