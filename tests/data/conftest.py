"""Small real inputs: folders of text files, and folders that `datasets.load_dataset` reads."""

from pathlib import Path

import datasets.config
import pandas as pd
import pytest

from normfree.spec.run import DataSpec


@pytest.fixture
def texts() -> list[str]:
    """Sixty different documents of a few hundred bytes."""
    line = "def function_{0}_{1}(value):\n    return value + {2}\n\n"
    return ["".join(line.format(number, n, n * number) for n in range(8)) for number in range(60)]


@pytest.fixture
def text_folder(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"file_{number}.py").write_text(text)
    return folder


@pytest.fixture
def spec(text_folder: Path) -> DataSpec:
    return DataSpec(source="files", paths=(str(text_folder),), vocab_size=300, context=16)


@pytest.fixture(autouse=True)
def no_cache_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")


@pytest.fixture
def hub_folder(tmp_path: Path, texts: list[str]) -> Path:
    """A data set with CodeParrot's columns, on disk as the hub stores it."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, part in (("train", texts[:50]), ("validation", texts[50:])):
        frame = pd.DataFrame({"repo_name": ["some/repo"] * len(part), "path": "a.py", "content": part})
        frame.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder
