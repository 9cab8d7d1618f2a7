"""The model on CUDA: the numbers of the CPU, loss without logits, caches, checkpointing, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.model.loss import next_token_loss

DEVICE = "cuda"
IDS = torch.randint(0, 61, (3, 40), generator=torch.Generator().manual_seed(3))
PADDED = torch.ones(3, 40, dtype=torch.long)
PADDED[0, :13] = 0
FORMS: dict[str, dict[str, Any]] = {
    "gpt2 without norms": {"norm": "none", "activation": "relu"},
    "gpt2": {"norm": "layernorm", "activation": "gelu"},
    "pythia": {"norm": "none", "residual": "parallel", "position": "rotary", "bias": "all"},
    "shared slope": {"norm": "none", "activation": "leaky_relu", "learnable_slope": "shared"},
}


def learn(
    model: Any, *inputs: Tensor, dtype: torch.dtype | None = None, **named: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one pass in training mode on the GPU."""
    model = model.to(DEVICE).train()
    with torch.autocast(DEVICE, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(*inputs, **named).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return loss.item(), gradients


def assert_near(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """The L2 norm of each difference is below `tolerance` of the norm of the gradient."""
    for name, gradient in theirs.items():
        error = (mine[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: {float(error):.1e}"


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "left padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float32_logits_are_those_of_the_cpu(form, mask, attention, build):
    model = build(attention=attention, **FORMS[form])
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
        mask = None if mask is None else mask.to(DEVICE)
        logits = model.to(DEVICE)(IDS.to(DEVICE), attention_mask=mask).logits.cpu()
    real = slice(None) if mask is None else PADDED.bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "left padded"])
def test_eager_and_sdpa_attention_have_the_same_gradients(form, mask, build):
    ids = IDS.to(DEVICE)
    labels = ids.clone()
    if mask is not None:
        mask = mask.to(DEVICE)
        labels[0, :14] = -100  # 13 of padding, and the first token, which padding would predict
    (loss, mine), (expected, theirs) = (
        learn(build(attention=attention, **FORMS[form]), ids, attention_mask=mask, labels=labels)
        for attention in ("sdpa", "eager")
    )
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=2e-5, rtol=1e-3, msg=name)


def test_the_loss_in_blocks_matches_all_logits_in_float64():
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 700, 64, generator=random), torch.randn(5000, 64, generator=random) * 0.1
    labels = torch.randint(0, 5000, (4, 700), generator=random)
    labels[0, 3:70] = labels[1, -1] = -100
    exact = [value.double().requires_grad_() for value in (hidden, weight)]
    truth = F.cross_entropy((exact[0][:, :-1] @ exact[1].mT).flatten(0, 1), labels[:, 1:].flatten())
    (3 * truth).backward()
    tolerances = {None: (1e-6, 1e-5), torch.bfloat16: (1e-3, 0.01), torch.float16: (2e-4, 2e-3)}
    for dtype, (loss_tolerance, gradient_tolerance) in tolerances.items():
        ours = [value.clone().to(DEVICE).requires_grad_() for value in (hidden, weight)]
        with torch.autocast(DEVICE, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = next_token_loss(*ours, labels.to(DEVICE))
        (3 * loss).backward()
        assert loss.item() == pytest.approx(truth.item(), rel=loss_tolerance), dtype
        for mine, theirs in zip(ours, exact, strict=True):
            error = (mine.grad.cpu().double() - theirs.grad).norm() / theirs.grad.norm()
            assert error < gradient_tolerance, f"{dtype}: gradients are {float(error):.1e} off"


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_a_model_learns_the_same_without_logits(form, dtype, tolerance, build):
    ids = IDS.to(DEVICE)
    (expected, theirs), (loss, mine) = (
        learn(build(**FORMS[form]), ids, labels=ids, return_logits=return_logits, dtype=dtype)
        for return_logits in (True, False)
    )
    assert loss == pytest.approx(expected, rel=tolerance)
    assert_near(mine, theirs, 5 * tolerance)


@pytest.mark.parametrize("form", list(FORMS))
def test_greedy_generation_with_a_cache_is_the_one_without(form, build):
    model = build(**FORMS[form]).to(DEVICE)
    model.generation_config.eos_token_id = None
    ids, mask = IDS[:2, :20].to(DEVICE), PADDED[:2, :20].to(DEVICE)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(ids, attention_mask=mask, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_has_the_same_gradients(form, reentrant, build):
    ids, results = IDS.to(DEVICE), []
    for checkpointing in (False, True):
        model = build(**FORMS[form])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        results.append(learn(model, ids, labels=ids, return_logits=False, dtype=torch.bfloat16))
    (expected, theirs), (loss, mine) = results
    assert loss == pytest.approx(expected, rel=1e-4)
    assert_near(mine, theirs, 1e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", [3, 67, 131], ids=["query", "key", "value"])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "left padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_nan_weight_gives_a_nan_loss(dtype, row, mask, attention, build):
    """Fused attention may return 0 if all scores of a row are NaN: on the CPU some kernels do."""
    model = build(attention=attention, norm="none")
    with torch.no_grad():
        model.model.layers[0].attention.qkv.weight[row] = torch.nan
    model.to(DEVICE)
    mask = None if mask is None else mask.to(DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(IDS.to(DEVICE), attention_mask=mask, labels=IDS.to(DEVICE))
    real = slice(None) if mask is None else PADDED.bool()
    assert output.loss.isnan(), f"loss {output.loss.item()}"
    assert output.logits.isnan().all(-1).cpu()[real].all()
