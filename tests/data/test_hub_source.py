"""Hugging Face data sets: splits, limits, and what cannot be loaded."""

import errno
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub.constants
import pytest

from normfree.spec.run import DataSpec
from tests.data.prepare import make


@pytest.fixture
def spec(hub_folder: Path) -> DataSpec:
    return DataSpec(source="hub", dataset=str(hub_folder), vocab_size=300, context=16)


@pytest.mark.parametrize("source", ["hub", "codeparrot"])
def test_data_sets_go_through_load_dataset(spec: DataSpec, tmp_path: Path, source) -> None:
    limits = {"train_documents": 30, "validation_documents": 5}
    spec = replace(spec, source=source, validation_dataset=spec.dataset, **limits)
    corpus = make(spec, tmp_path)
    facts = corpus.facts()
    assert (facts["train_documents"], facts["validation_documents"]) == (30, 5)
    assert set(facts["revisions"]) == {"train", "validation"}
    assert make(replace(spec, shuffle_seed=1), tmp_path).fingerprint != corpus.fingerprint
    assert make(replace(spec, max_bytes=5000), tmp_path).facts()["train_bytes"] <= 5000


@pytest.mark.parametrize(("source", "duplicates"), [("hub", {"duplicate": 10}), ("codeparrot", {})])
def test_training_repeats_validation_only_in_codeparrot(spec, tmp_path: Path, source, duplicates) -> None:
    spec = replace(spec, source=source, validation_split="train[:20%]")
    facts = make(spec, tmp_path).facts()
    assert facts["validation_documents"] == 10
    assert facts["dropped"]["train"] == duplicates


def test_an_unreachable_name_is_refused_in_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing', .* cannot be loaded .*without a network") as caught:
        make(DataSpec(source="hub", dataset="nobody/nothing"), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_data_set_that_does_not_fit_is_refused(spec: DataSpec, hub_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'dev', cannot be loaded \(.*train.*check the name, the split"):
        make(replace(spec, validation_split="dev"), tmp_path)
    with pytest.raises(ValueError, match=r"no column 'text'; set data.column to one of: content, path, repo_name"):
        make(replace(spec, column="text"), tmp_path)
    for file in hub_folder.iterdir():
        file.unlink()
    (hub_folder / "train.jsonl").write_text('{"content": "a"}\n{"content": \n')
    with pytest.raises(ValueError, match=r"cannot be loaded \(ArrowInvalid: JSON parse error: .* in row 1\)"):
        make(spec, tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "quota"), RuntimeError("Data processing error:\nquota")])
def test_a_full_disk_is_the_stated_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*quota\): .*HF_HOME moves"):
        make(DataSpec(source="hub", dataset="some/name"), tmp_path)
