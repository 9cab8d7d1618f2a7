"""bf16 matrix products by fp32 units against torch's own bf16 kernels."""

import logging

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.training import precision as bf16
from normfree.training.precision import ProductsInFp32
from tests.training.runs import losses


def factors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (torch.mm, [(40, 24), (24, 56)]),
        (lambda bias, a, b: torch.addmm(bias, a, b, beta=0.5, alpha=2.0), [(56,), (40, 24), (24, 56)]),
        (torch.bmm, [(3, 40, 24), (3, 24, 56)]),
        (lambda base, a, b: torch.baddbmm(base, a, b, alpha=0.3), [(40, 56), (3, 40, 24), (3, 24, 56)]),
        (F.linear, [(2, 40, 24), (56, 24), (56,)]),
    ],
)
def test_products_match_bf16_kernels_to_the_last_bit(product, shapes):
    operands = factors(*shapes)
    native = product(*operands)
    with ProductsInFp32():
        emulated = product(*operands)
    exact = product(*(factor.double() for factor in operands))
    assert emulated.dtype == torch.bfloat16
    assert (emulated == native).float().mean() > 0.98
    assert (emulated == exact.bfloat16()).float().mean() > 0.98
    assert torch.allclose(emulated.double(), exact, rtol=2**-8, atol=1e-5)


class DtypesOfProducts(TorchDispatchMode):
    """Records the dtypes that reach matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.dtypes += [args[0].dtype, args[1].dtype]
        return func(*args, **(kwargs or {}))


def test_every_product_of_both_passes_is_computed_in_fp32():
    x, weight = (factor.requires_grad_() for factor in factors((40, 24), (56, 24)))
    with DtypesOfProducts() as products, ProductsInFp32():
        F.linear(x, weight).square().sum().backward()
    assert products.dtypes == 6 * [torch.float32]


def test_nan_and_infinity_go_through():
    a, b = factors((2, 3), (3, 4))
    a[0, 0], a[1, 1] = torch.nan, torch.inf
    with ProductsInFp32():
        product = a @ b
    assert product[0].isnan().all()
    assert product[1].isinf().all()


def test_compiled_bf16_without_bf16_units_is_refused(train_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bf16, "has_bf16_units", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"train\.compile=true needs a processor with bf16 units"):
        train_tiny("train.precision=bf16", "train.compile=true")
    assert not list(tmp_path.iterdir()), "a refused run leaves nothing behind"


def test_bf16_trains_alike_without_bf16_units(train_tiny, monkeypatch, caplog):
    runs, entered = {}, []
    enter = ProductsInFp32.__enter__
    monkeypatch.setattr(ProductsInFp32, "__enter__", lambda mode: entered.append(units) or enter(mode))
    for units in (True, False):
        monkeypatch.setattr(bf16, "has_bf16_units", lambda units=units: units)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="normfree"):
            words = "train.precision=bf16", "model.initializer_range=0.02"  # wider logits round further apart
            runs[units] = train_tiny(*words, runs=str(units))
        assert ("no bf16 units" in caplog.text) is not units
    assert entered == [False]
    assert len(losses(runs[True])) == 6
    assert losses(runs[False]) == pytest.approx(losses(runs[True]), rel=1e-4)
    assert runs[False].perplexity == pytest.approx(runs[True].perplexity, rel=1e-3)
