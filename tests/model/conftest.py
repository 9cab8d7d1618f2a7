"""Small models and token ids."""

import pytest
import torch

from tests.small_model import small_model


@pytest.fixture
def build():
    """`build(**fields)`: a small model in eval mode, its weights far from their initial values."""
    return small_model


@pytest.fixture
def ids():
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(3))
