from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from normfree import Run, compose_run, read_run, train
from tests.training.fork_server import ForkServer


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def train_tiny(tiny: list[str], cache: Path, tmp_path: Path) -> Callable[..., Run]:
    """`train_tiny(*overrides, runs="runs")`: train in tmp_path/runs and read the folder."""

    def run(*overrides: str, runs: str = "runs") -> Run:
        spec = compose_run([*tiny, "variant=sm-r", *overrides]).spec
        return read_run(train(spec, runs_dir=tmp_path / runs, cache=cache, progress=False))

    return run


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """Where `train_tiny` trains."""
    return tmp_path / "runs" / "single" / "sm-r-seed0"
