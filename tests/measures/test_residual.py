"""Measures of logits and of the residual stream against what the models themselves compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normfree import measure
from normfree.measures.residual import Residual
from tests.entropy.families import tiny_model

IDS = torch.arange(48).view(4, 12) % 20


@pytest.mark.parametrize("batch", [4, 1])
def test_the_largest_logit_is_that_of_the_written_out_scores(batch: int) -> None:
    """GPT-2's own projections, in float64, scored against each other under a causal mask."""
    model = tiny_model("gpt2")
    measured = measure(model, IDS, "logits", batch=batch)
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    for layer, block in enumerate(model.transformer.h):
        q, k, _ = block.attn.c_attn(block.ln_1(hidden[layer])).double().chunk(3, dim=-1)
        heads = model.config.n_head
        q, k = (value.unflatten(-1, (heads, -1)).transpose(1, 2) for value in (q, k))
        scores_BHTT = q @ k.mT / q.shape[-1] ** 0.5
        scores_BHTT.masked_fill_(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
        assert measured["max_logit"][layer] == pytest.approx(scores_BHTT.amax((0, 2, 3)).tolist(), rel=1e-5)


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
