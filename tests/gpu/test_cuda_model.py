"""The model on CUDA: the numbers of the CPU, loss without logits, checkpointing, NaN."""

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
@pytest.mark.parametrize(
    ("change", "named", "dtype", "tolerance"),
    [
        ({"attention": "eager"}, {}, None, 1e-3),
        ({}, {"return_logits": False}, None, 1e-4),
        ({}, {"return_logits": False}, torch.bfloat16, 0.1),
        ({}, {"return_logits": False}, torch.float16, 0.025),
        ({"use_reentrant": True}, {}, torch.bfloat16, 0.1),
        ({"use_reentrant": False}, {}, torch.bfloat16, 0.1),
    ],
    ids=["eager", "no logits", "no logits, bf16", "no logits, fp16", "reentrant checkpoints", "checkpoints"],
)
def test_other_ways_have_the_same_loss_and_gradients(form, mask, change, named, dtype, tolerance, build):
    ids, mask = IDS.to(DEVICE), None if mask is None else mask.to(DEVICE)
    labels = ids.clone()
    if mask is not None:
        labels[0, :14] = -100  # 13 of padding, and the first token, which padding would predict
    inputs = {"attention_mask": mask, "labels": labels, "dtype": dtype}
    expected, theirs = learn(build(**FORMS[form]), ids, **inputs)
    other = build(**FORMS[form], **({} if "use_reentrant" in change else change))
    if "use_reentrant" in change:
        other.gradient_checkpointing_enable(change)
    loss, mine = learn(other, ids, **inputs, **named)
    assert loss == pytest.approx(expected, rel=tolerance / 5, abs=1e-5)
    for name, gradient in theirs.items():
        error = (mine[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: {float(error):.1e}"


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
