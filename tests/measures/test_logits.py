from __future__ import annotations

import pytest
import torch

from normfree import measure
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
