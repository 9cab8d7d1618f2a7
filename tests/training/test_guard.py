import math

import pytest
import torch

from normfree.model import NormFreeForCausalLM
from normfree.training.guard import Divergence, earliest, locate
from tests.small_model import small_model


@pytest.fixture
def model() -> NormFreeForCausalLM:
    return small_model(norm="none")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids_BT = torch.arange(16).view(2, 8)
    return {"input_ids": ids_BT, "labels": ids_BT}


def matrix_of_layer(model: NormFreeForCausalLM, layer: int) -> torch.nn.Parameter:
    return next(p for name, p in model.named_parameters() if f".{layer}." in name and p.ndim == 2)


def test_an_overflow_is_found_in_its_first_layer(model, batch) -> None:
    with torch.no_grad():
        matrix_of_layer(model, 2).fill_(3e38)
    divergence = locate(model, [batch], step=1)
    assert (divergence.kind, divergence.layer) == ("activation", 2)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_gradient_nearest_to_the_loss_is_named(model, batch) -> None:
    model(**batch).loss.backward()
    for layer in (0, 1):
        gradient = matrix_of_layer(model, layer).grad
        assert gradient is not None
        gradient[0, 0] = math.nan
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    divergence = locate(model, [batch], step=2)
    assert (divergence.kind, divergence.layer) == ("gradient", 1)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
    for parameter in model.model.final_norm.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert "final_norm" in locate(model, [batch], step=2).module


def test_the_process_that_saw_it_first_is_believed() -> None:
    """Gradients are averaged, so that a NaN in the batch of one process is in the gradients of all."""
    elsewhere, here = (Divergence(3, layer, "m", kind) for layer, kind in ((1, "gradient"), (2, "activation")))
    assert earliest([elsewhere, here]) == here
