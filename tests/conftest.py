import gc
import inspect
import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression
from hypothesis import HealthCheck, settings

from normfree.cli.main import main
from normfree.spec.compose import compose_run
from normfree.spec.run import RunSpec
from tests.images import write_digits

settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


def pytest_configure(config: pytest.Config) -> None:
    """Hide every GPU unless `-m` selects the tests that need one."""
    selection = config.option.markexpr
    if selection and not Expression.compile(selection).evaluate(lambda name, /, **_: name == "gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Keep what is imported out of garbage collections: Trainer starts one in every run."""
    gc.freeze()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest) -> str:
    """The family of `tiny`: decoder, unless a test chooses with `parametrize("family", FAMILIES, indirect=True)`."""
    return getattr(request, "param", "decoder")


@pytest.fixture(scope="session")
def tiny(family: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a run of seconds, 2 layers x 32: on real Python code, T = 16, or on drawn digits, 17 tokens.

    Its initial weights are large: with 0.02 every head attends evenly, within 5e-8 nats of the ceiling.
    """
    folder = tmp_path_factory.mktemp(family)
    words = words_of_images(folder) if family == "vision" else words_of_text(folder)
    return [*words, *(["preset=denoise"] if family == "encoder_decoder" else []), *TINY.split()]


def words_of_text(folder: Path) -> list[str]:
    for number, module in enumerate((json.decoder, json.encoder, textwrap, inspect)):
        (folder / f"{number}.py").write_text(inspect.getsource(module))
    (folder / "held_out").mkdir()
    for number, document in enumerate(inspect.getsource(json).split("\n\n\n")[2:6]):  # a run is evaluated on all
        (folder / "held_out" / f"{number}.txt").write_text(document)
    paths = [f"data.paths=['{folder}/*.py']", f"data.validation_paths=['{folder}/held_out']"]
    return ["preset=cpu-quick", "data=files", *paths, *SMALL_TEXT.split()]


SMALL_TEXT = "data.vocab_size=300 data.context=16 data.max_bytes=null data.max_bytes_per_package=null"


def words_of_images(folder: Path) -> list[str]:
    train, held_out = write_digits(folder / "train", 160), write_digits(folder / "held_out", 40, seed=1)
    paths = [f"data.paths=['{train}']", f"data.validation_paths=['{held_out}']"]
    sizes = ["model.image_size=8", "model.patch_size=2", "train.epochs=null"]
    return ["preset=fashion-vit", "data=images", *paths, *sizes]


TINY = """
    model.hidden_size=32 model.num_hidden_layers=2 model.num_attention_heads=2 model.initializer_range=0.3
    train.steps=6 train.precision=fp32 train.peak_learning_rate=1e-3 train.batch_sequences=8
    train.micro_batch_sequences=8 train.log_every=1 train.evaluate_every=3 train.checkpoint_every=2 train.threads=1
    probe.every_steps=2 probe.sequences=8 probe.final_sequences=16 probe.measures=[heads,slopes]
"""
"""All default measures would double the time; test_readme.py takes them."""


@pytest.fixture
def tiny_spec(tiny: list[str]) -> Callable[..., RunSpec]:
    def build(*overrides: str) -> RunSpec:
        return compose_run([*tiny, "variant=sm-r", *overrides]).spec

    return build


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: list[str], cache: Path) -> Path:
    """A run folder made by the command; no test writes into it."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["train", *tiny, "variant=sm-r", f"runs_dir={runs}", f"cache_dir={cache}"]) == 0
    return runs / "single" / "sm-r-seed0"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run(*words)`: a command in this process; its exit status, standard output and standard error."""

    def command(*words: str) -> tuple[int, str, str]:
        status = main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.fixture
def output(run: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """`output(*words)`: the standard output of a command, which must succeed."""

    def command(*words: str) -> str:
        status, out, err = run(*words)
        assert status == 0, err
        return out

    return command
