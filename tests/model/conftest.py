"""Small models for the tests of this room."""

import pytest
import torch

from tests.small_model import small_model


@pytest.fixture
def build():
    """`build(**fields)`: a small model in eval mode whose weights are far from their start."""
    return small_model


@pytest.fixture
def ids():
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(3))
