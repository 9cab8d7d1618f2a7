"""Head entropies as a part of training: values and gradients against the definition, and against entropy/."""

import pytest
import torch

from normfree.entropy import EntropyProbe
from normfree.model import head_entropy
from normfree.model.head_entropy import head_entropies


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 20, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]


def by_definition(query, key, scaling, causal):
    hidden = torch.ones(20, 20, dtype=torch.bool).triu(1) & causal
    weights = (query @ key.mT * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
    logs = weights.clamp(min=1e-300).log()
    return -(weights * logs).sum(-1).mean((0, 2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [256, 7])
def test_entropies_and_gradients_are_those_of_the_definition(states, rows, causal, monkeypatch):
    monkeypatch.setattr(head_entropy, "ROWS", rows)
    results = []
    for compute in (head_entropies, by_definition):
        entropies = compute(*states, 0.7, causal=causal)
        weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        results.append((entropies, *torch.autograd.grad(entropies @ weights, states)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_uniform_rows_have_no_gradient():
    query, key = torch.zeros(1, 1, 6, 4, requires_grad=True), torch.randn(1, 1, 6, 4)
    (gradient,) = torch.autograd.grad(head_entropies(query, key, 1.0, causal=True).sum(), query)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-7, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_returns_the_entropies_that_a_probe_measures(build, ids, attention):
    model = build(attention=attention, attention_temperature="head", query_key_norm="rmsnorm").train()
    with EntropyProbe(model) as probe:
        output = model(ids, entropy_layers=(0, 2))
    measured = probe.statistics().mean_nats()[[0, 2]]
    torch.testing.assert_close(output.head_entropies.double(), measured, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"attention_mask": torch.ones(2, 12)}, "needs full blocks"),
        ({}, {"entropy_layers": (3,)}, "allowed: 0 to 2"),
        ({"attention_sink": "learned"}, {}, "needs attention_sink='none'"),
    ],
)
def test_entropies_that_cannot_be_given_are_refused(build, ids, fields, options, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)(ids, **({"entropy_layers": (0,)} | options))


def test_bf16_training_takes_them_from_the_written_out_weights(build, ids):
    model = build(norm="layernorm", spread=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, entropy_layers=(0, 2))
        with EntropyProbe(model) as probe:
            model(ids)
    output.head_entropies.sum().backward()
    measured = probe.statistics().mean_nats()[[0, 2]]
    torch.testing.assert_close(output.head_entropies.double(), measured, atol=3e-3, rtol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.model.layers[2].attention.qkv.weight.grad.abs().max() > 0
