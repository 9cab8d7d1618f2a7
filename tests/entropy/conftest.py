import pytest


@pytest.fixture(scope="session")
def device() -> str:
    """Where tests measure; those that tests/gpu imports run on CUDA there."""
    return "cpu"
