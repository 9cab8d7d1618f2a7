"""AttentionTap reads what the model's own attention computes, and leaves the registry as it was."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from normfree.entropy import EntropyProbe
from normfree.entropy.layers import labels
from normfree.entropy.tap import AttentionTap
from tests.entropy.families import tiny_model

IDS = torch.arange(24).view(2, 12) % 20


def eager_weights(call):
    request = call.request()
    block = request.visibility.whole()
    return request.scores(block).masked_fill(~block.visible, -torch.inf).softmax(-1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("probe_first", [True, False])
def test_a_tap_reads_every_call_beside_a_probe(family, probe_first):
    model = tiny_model(family).eval()
    read, before = {}, dict(ALL_ATTENTION_FUNCTIONS)
    tap, probe = AttentionTap(model, lambda layer, call: read.update({layer: call})), EntropyProbe(model)
    first, second = (probe, tap) if probe_first else (tap, probe)
    with torch.no_grad(), first, second:
        model(IDS)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(IDS, output_attentions=True).attentions
    assert labels(read) == list(range(len(attentions)))
    for layer, weights in zip(sorted(read), attentions, strict=True):
        assert torch.allclose(eager_weights(read[layer]), weights, atol=1e-5)
    assert probe.statistics().rows.unique().tolist() == [IDS.numel()]


def test_a_tap_leaves_the_registry_after_an_exception():
    model, before = tiny_model("gpt2"), dict(ALL_ATTENTION_FUNCTIONS)

    def fail(layer, call):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), AttentionTap(model, fail):
        model(IDS)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
