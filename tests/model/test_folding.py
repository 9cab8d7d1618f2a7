"""Norms with a fixed scale fold into the matrices that read them."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from normfree.model import NormFreeForCausalLM
from normfree.model.folding import fold_norms
from normfree.model.norms import FakeLayerNorm

REMOVED = {"norm": "fake", "fake_start_step": 3, "fake_gap_steps": 2}


def trained(build: Any, ids: torch.Tensor, steps: int, **form: Any) -> NormFreeForCausalLM:
    """A model with random gains and offsets, whose norms are advanced by `steps` steps."""
    model = build(**form).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for step in range(1, steps + 1):
        model.advance(step, model(ids).norm_sums)
    return model.eval()


@pytest.mark.parametrize("final_norm", ["layernorm", "fake"])
@pytest.mark.parametrize(
    "form",
    [
        {"bias": "qk"},
        {"bias": "none", "residual": "parallel", "position": "rotary", "rotary_share": 1.0},
        {"bias": "all", "query_key_norm": "rmsnorm", "attention_sink": "learned", "branch": "layerscale"},
    ],
)
def test_a_folded_model_computes_the_same(build, ids, form, final_norm):
    model = trained(build, ids, 40, **REMOVED, final_norm=final_norm, **form)
    folded = fold_norms(model)
    torch.testing.assert_close(folded(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-5)
    left = {type(module).__name__ for module in folded.modules()} & {"LayerNorm", "FakeLayerNorm"}
    assert left == (set() if final_norm == "fake" else {"LayerNorm"})
    loss = folded(ids, labels=ids, return_logits=False).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss, atol=1e-5, rtol=0)
    assert folded.half()(ids).logits.isfinite().all()


def test_a_tapered_norm_folds(build, ids):
    model = trained(build, ids, 9, norm="taper", taper_end_step=8)
    torch.testing.assert_close(fold_norms(model)(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-5)


def test_norms_go_one_by_one(build, ids):
    model = build(**REMOVED).train()
    removed_at: dict[str, int] = {}
    for step in range(1, 30):
        model.advance(step, model(ids).norm_sums)
        for name, norm in model.named_modules():
            if isinstance(norm, FakeLayerNorm) and norm.is_fixed:
                removed_at.setdefault(name, step + 1)
    parts = [*(f"{layer}.feed_forward_norm" for layer in range(3)), *(f"{layer}.attention_norm" for layer in range(3))]
    assert removed_at == {f"model.layers.{part}": 3 + 2 * number for number, part in enumerate(parts)}


def test_a_fake_norm_is_layernorm_until_it_is_fixed():
    norm, features = FakeLayerNorm(8, 1e-5, removal=3, merge=9), torch.randn(2, 5, 8) * 3 + 1
    for tensor in (norm.is_fixed, norm.sigma_first, norm.sigma_rest):
        tensor.zero_()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = F.layer_norm(features, (8,), norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(norm(features), expected, atol=1e-5, rtol=0)
    sigmas = (features.var(-1, correction=0) + 1e-5).sqrt()
    norm.advance(1, norm.sums(features))
    norm.advance(2, norm.sums(2 * features))
    rest = 0.9 * sigmas[:, 1:].mean() + 0.1 * 2 * sigmas[:, 1:].mean()
    torch.testing.assert_close(norm.sigma_rest, rest, atol=1e-4, rtol=0)
    centred = features - features.mean(-1, keepdim=True)
    fixed = centred[:, 1:] / rest * norm.weight + norm.bias
    torch.testing.assert_close(norm(features)[:, 1:], fixed, atol=1e-4, rtol=0)
    for step in range(3, 9):
        norm.advance(step, norm.sums(100 * features))
    torch.testing.assert_close(norm.sigma_first, rest, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("steps", "form", "message"),
    [
        (2, REMOVED, "layers.0.attention_norm still depends on each token's scale"),
        (1, {"norm": "layernorm"}, "there is nothing to fold"),
        (40, REMOVED | {"attention_gate": "head"}, "attention_gate='head'"),
        (40, REMOVED | {"linear": "spectral_norm"}, "linear='spectral_norm'"),
    ],
)
def test_models_that_do_not_fold(build, ids, steps, form, message):
    with pytest.raises(ValueError, match=message):
        fold_norms(trained(build, ids, steps, **form))
