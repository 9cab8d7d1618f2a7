from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.fork_server import ForkServer


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()
