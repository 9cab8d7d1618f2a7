"""What the tests on a GPU share: products in full float32, and a small model far from its start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from normfree.model import NormFreeConfig, NormFreeForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def full_float32_products() -> Iterator[None]:
    """No TF32, whose products are good to three digits; and what a test sets does not reach the next."""
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "ieee"
    yield
    torch.backends.fp32_precision = before


@pytest.fixture
def build() -> Callable[..., NormFreeForCausalLM]:
    """`build(**fields)`: a small model on the CPU in evaluation mode, its weights far from their start."""

    def make(*, seed: int = 0, attention: str = "sdpa", **fields: Any) -> NormFreeForCausalLM:
        torch.manual_seed(seed)
        config = NormFreeConfig(**(SIZES | fields))
        model = NormFreeForCausalLM._from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.endswith("slope"):
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make
