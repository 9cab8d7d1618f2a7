"""bf16 matrix products by fp32 units against torch's own bf16 kernels."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.store.runs import read_run
from normfree.training import bf16, train
from normfree.training.bf16 import ProductsInFp32


def factors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (torch.mm, [(40, 24), (24, 56)]),
        (torch.addmm, [(56,), (40, 24), (24, 56)]),
        (lambda bias, a, b: torch.addmm(bias, a, b, beta=0.5, alpha=2.0), [(56,), (40, 24), (24, 56)]),
        (torch.bmm, [(3, 40, 24), (3, 24, 56)]),
        (lambda base, a, b: torch.baddbmm(base, a, b, alpha=0.3), [(40, 56), (3, 40, 24), (3, 24, 56)]),
        (F.linear, [(2, 40, 24), (56, 24), (56,)]),
        (F.linear, [(2, 40, 24), (56, 24)]),
    ],
)
def test_products_are_those_of_bf16_kernels_up_to_the_last_bit(product, shapes):
    given = factors(*shapes)
    own = product(*given)
    with ProductsInFp32():
        ours = product(*given)
    exact = product(*(factor.double() for factor in given))
    assert ours.dtype == torch.bfloat16
    assert (ours == own).float().mean() > 0.98
    assert (ours == exact.bfloat16()).float().mean() > 0.98
    assert torch.allclose(ours.double(), exact, rtol=2**-8, atol=1e-5)


def test_backward_passes_take_the_same_products():
    x, weight = factors((40, 24), (56, 24))
    gradients = []
    for context in (torch.enable_grad(), ProductsInFp32()):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with context:
            F.linear(*leaves).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for own, ours in zip(*gradients, strict=True):
        assert torch.linalg.norm(ours - own) < 2**-8 * torch.linalg.norm(own)


class DtypesOfProducts(TorchDispatchMode):
    """Notes the dtypes that reach matrix products."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.seen += [args[0].dtype, args[1].dtype]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ours", [True, False])
def test_fp32_units_get_every_product_forward_and_backward(ours):
    x, weight = (factor.requires_grad_() for factor in factors((40, 24), (56, 24)))
    with DtypesOfProducts() as products, ProductsInFp32() if ours else nullcontext():
        F.linear(x, weight).square().sum().backward()
    assert products.seen == 6 * [torch.float32 if ours else torch.bfloat16]


def test_products_outside_of_bf16_stay_what_they_are():
    a, b = (factor.float() for factor in factors((40, 24), (24, 56)))
    with ProductsInFp32():
        inside = a @ b
    assert torch.equal(inside, a @ b)


def test_nan_and_infinity_go_through():
    a, b = factors((2, 3), (3, 4))
    a[0, 0], a[1, 1] = torch.nan, torch.inf
    with ProductsInFp32():
        product = a @ b
    assert product[0].isnan().all()
    assert product[1].isinf().all()


def test_compiled_bf16_without_bf16_units_is_refused(tiny_spec, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(bf16, "has_bf16_units", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = tiny_spec("train.precision=bf16", "train.compile=true")
    with pytest.raises(ValueError, match=r"train\.compile=true needs a processor with bf16 units"):
        train(spec, runs_dir=tmp_path, cache=cache, progress=False)
    assert not list(tmp_path.iterdir()), "a refused run leaves nothing that a corrected one would meet"


def test_a_bf16_run_trains_alike_with_and_without_bf16_units(tiny_spec, tmp_path, cache, monkeypatch, caplog):
    spec = tiny_spec("train.precision=bf16", "model.initializer_range=0.02")  # wider logits round further apart
    found, entered = {}, []
    enter = ProductsInFp32.__enter__
    monkeypatch.setattr(ProductsInFp32, "__enter__", lambda mode: entered.append(units) or enter(mode))
    for units in (True, False):
        monkeypatch.setattr(bf16, "has_bf16_units", lambda units=units: units)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="normfree"):
            folder = train(spec, runs_dir=tmp_path / str(units), cache=cache, progress=False)
        assert ("no bf16 units" in caplog.text) is not units
        found[units] = read_run(folder)
    assert entered == [False]
    losses = [[value for _, value in run.series("train", "loss")] for run in found.values()]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert found[False].perplexity == pytest.approx(found[True].perplexity, rel=1e-3)
