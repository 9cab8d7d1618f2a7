"""What the tests on a GPU share: products in full float32, and a small model far from its start."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from normfree.model import NormFreeForCausalLM
from tests.small_model import small_model
from tests.training.conftest import train_tiny  # noqa: F401 - a fixture of the tests here too


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs a GPU."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def full_float32_products() -> Iterator[None]:
    """No TF32, whose products are good to three digits; and what a test sets does not reach the next."""
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "ieee"
    yield
    torch.backends.fp32_precision = before


@pytest.fixture(scope="session")
def device() -> str:
    """For the tests of tests/entropy that run here too."""
    return "cuda"


@pytest.fixture(scope="session")
def tiny(tiny: list[str]) -> list[str]:
    """With narrow first weights: the tolerances here were measured with those."""
    return [*tiny, "model.initializer_range=0.02"]


@pytest.fixture
def build() -> Callable[..., NormFreeForCausalLM]:
    """`build(**fields)`: a small model on the CPU in evaluation mode, its weights far from their start."""
    return partial(small_model, spread=0.1, hidden_size=64, num_hidden_layers=2, max_position_embeddings=64)
