"""prepare(): every source, reuse, damage, fingerprints and bad input."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest

from normfree.data import Corpus, default_cache, prepare, prepared
from normfree.data.sources import find_text_files, limited
from normfree.files import damages
from normfree.spec.run import DataSpec


def make(spec: DataSpec, cache: Path) -> Corpus:
    return prepare(spec, cache=cache, progress=False)


def token_ids(corpus: Corpus, split: str) -> np.ndarray:
    return np.array(getattr(corpus, split)["input_ids"][:])


@pytest.mark.parametrize("packing", ["windows", "concatenate"])
def test_blocks_decode_to_the_text_they_came_from(spec: DataSpec, tmp_path: Path, texts: list[str], packing) -> None:
    corpus = make(replace(spec, packing=packing), tmp_path)
    tokenizer = corpus.tokenizer()
    for split in ("train", "validation"):
        blocks = tokenizer.batch_decode(token_ids(corpus, split))
        pieces = blocks if packing == "windows" else "".join(blocks).split(str(tokenizer.eos_token))
        assert all(any(piece in text for text in texts) for piece in pieces)
        assert token_ids(corpus, split).shape[1] == 16
    end = tokenizer.eos_token_id
    assert (end in token_ids(corpus, "train")) == (packing == "concatenate")
    facts = corpus.facts()
    assert facts["train_documents"] == 57
    assert facts["validation_documents"] == 3
    assert facts["train_tokens"] == token_ids(corpus, "train").size
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize("packing", ["windows", "concatenate"])
def test_predicted_bytes_are_those_of_tokens_two_to_last(spec: DataSpec, tmp_path: Path, packing) -> None:
    corpus = make(replace(spec, packing=packing), tmp_path)
    tokenizer = corpus.tokenizer()
    texts = tokenizer.batch_decode(token_ids(corpus, "validation")[:, 1:], skip_special_tokens=True)
    sizes = corpus.validation["predicted_bytes"][:]
    assert sizes == [len(text.encode()) for text in texts]
    total = sum(sizes)
    assert corpus.facts()["bytes_per_token"] == pytest.approx(total / (15 * len(corpus.validation)))


def test_unigram_perplexity_matches_a_plain_count(spec: DataSpec, tmp_path: Path) -> None:
    corpus = make(spec, tmp_path)
    counts = dict.fromkeys(range(corpus.vocab_size), 1)
    for token in token_ids(corpus, "train").reshape(-1).tolist():
        counts[token] += 1
    predicted = token_ids(corpus, "validation")[:, 1:].reshape(-1).tolist()
    nats = [-np.log(counts[token] / sum(counts.values())) for token in predicted]
    assert corpus.facts()["unigram_perplexity"] == pytest.approx(np.exp(np.mean(nats)))


def test_a_prepared_corpus_is_reused_and_described(spec: DataSpec, tmp_path: Path) -> None:
    first = make(spec, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = make(replace(spec, expected_fingerprint="other"), tmp_path)
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before
    assert first.fingerprint in second.describe()
    assert "57 documents" in second.describe()
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == [first.folder.name]


def test_changed_text_or_spec_makes_another_corpus(spec: DataSpec, tmp_path: Path, text_folder: Path) -> None:
    first = make(spec, tmp_path)
    assert make(replace(spec, context=8), tmp_path).fingerprint != first.fingerprint
    (text_folder / "file_0.py").write_text("class Other:\n    changed = True\n" * 30)
    assert make(spec, tmp_path).fingerprint != first.fingerprint


@pytest.mark.parametrize("name", ["train.arrow", "validation.arrow", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_mended(spec: DataSpec, tmp_path: Path, caplog, name: str, damage: str) -> None:
    first = make(spec, tmp_path)
    path = first.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with caplog.at_level(logging.WARNING, logger="normfree"):
        second = make(spec, tmp_path)
    assert "is damaged and prepared again" in caplog.text
    assert name in caplog.text
    assert second.fingerprint == first.fingerprint
    assert damages(second.folder) == []


def test_fingerprint_does_not_depend_on_the_place(spec: DataSpec, tmp_path: Path, text_folder: Path) -> None:
    moved = text_folder.rename(tmp_path / "moved")
    for number, path in enumerate(sorted(moved.iterdir())):
        path.rename(moved / f"renamed_{60 - number}.py")
    there = make(replace(spec, paths=(str(moved),)), tmp_path / "there")
    text_folder.mkdir()
    for path in moved.iterdir():
        (text_folder / path.name).write_bytes(path.read_bytes())
    assert make(spec, tmp_path / "here").fingerprint == there.fingerprint


def test_a_text_that_moved_is_not_prepared_again_and_is_found_by_its_fingerprint(
    spec: DataSpec, tmp_path: Path, text_folder: Path
) -> None:
    first = make(spec, tmp_path / "cache")
    moved = text_folder.rename(tmp_path / "moved")
    assert make(replace(spec, paths=(str(moved),)), tmp_path / "cache").folder == first.folder
    held_out = str(next(moved.iterdir()))
    apart = make(replace(spec, paths=(str(moved),), validation_paths=(held_out,)), tmp_path / "cache")
    assert apart.folder != first.folder
    found = prepared(first.facts(), cache=tmp_path / "cache")
    assert found is not None
    assert found.folder == first.folder
    assert prepared(first.facts() | {"bytes_per_token": 1.0}, cache=tmp_path / "cache") is None
    (first.folder / "train.arrow").write_bytes(b"damaged")
    assert prepared(first.facts(), cache=tmp_path / "cache") is None


def test_files_with_few_files_hold_out_documents(tmp_path: Path, texts: list[str]) -> None:
    rows = [json.dumps({"content": text}) for text in [*texts, texts[0]]]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    facts = make(
        DataSpec(source="files", paths=(str(tmp_path / "*.jsonl"),), vocab_size=300, context=16), tmp_path
    ).facts()
    assert (facts["train_documents"], facts["validation_documents"]) == (57, 3)
    assert facts["dropped"] == {"train": {"duplicate": 1}, "validation": {}}


def test_files_of_other_types_are_counted_as_left_out(tmp_path: Path, texts: list[str]) -> None:
    for name in ("a.py", "b.md", "c.txt", "d.rst"):
        (tmp_path / name).write_text("\n".join(texts[:30] if name == "a.py" else texts[30:]))
    corpus = make(DataSpec(source="files", paths=(str(tmp_path),), vocab_size=300, context=16), tmp_path / "cache")
    assert corpus.facts()["dropped"]["train"] == {"of another type": 2}
    assert "left out   2 of another type" in corpus.describe()


def test_hidden_folders_below_a_given_one_are_left_out_and_counted(tmp_path: Path, texts: list[str]) -> None:
    for name in ("project/a.py", "project/.venv/b.py", "project/.git/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("\n".join(texts if name.endswith("b.py") else texts[:30]))
    files, left_out = find_text_files([str(tmp_path / "project")], key="data.paths")
    assert files == [tmp_path / "project" / "a.py"]
    assert left_out == {"hidden": 2}
    asked_for, _ = find_text_files([str(tmp_path / "project" / ".venv")], key="data.paths")
    assert asked_for == [tmp_path / "project" / ".venv" / "b.py"]


def written(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(name)
    return [root / name for name in names]


@pytest.mark.parametrize("pattern", ["project", "project/**", "project/**/*.txt", "project/**/**/*.txt"])
def test_links_to_folders_are_followed_and_each_real_file_is_read_once(tmp_path: Path, pattern: str) -> None:
    files = written(tmp_path, "elsewhere/a.txt", "project/b.txt", "project/below/c.txt", "project/.git/d.txt")
    links = {"project/linked": "elsewhere", "project/loop": "project", "project/below/loop": "project"}
    links |= {"project/below/name.txt": "project/b.txt", "project/gone.txt": "nowhere", "project/.git/out": "elsewhere"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    found, left_out = find_text_files([str(tmp_path / pattern)], key="data.paths")
    assert sorted(file.resolve() for file in found) == sorted(files[:3])
    assert left_out == {"broken link": 1, **({} if "txt" in pattern else {"hidden": 1})}


@pytest.mark.parametrize("pattern", ["x/[v1]", "x/[v1]/a.txt", "x/[v1]/*.txt", "x/[v1]/**/*.txt", "x/b[2].txt", "x/c?"])
def test_what_exists_is_a_path_before_it_is_a_pattern(tmp_path: Path, pattern: str) -> None:
    written(tmp_path, "x/[v1]/a.txt", "x/b[2].txt", "x/b2.txt", "x/v/d.txt", "x/c?/e.txt", "x/cc/f.txt")
    (found,), _ = find_text_files([str(tmp_path / pattern)], key="data.paths")
    assert found.is_relative_to(tmp_path / pattern.partition("/*")[0])


def test_a_data_set_in_a_folder_with_brackets_is_refused_with_the_reason(hub_folder: Path, tmp_path: Path) -> None:
    folder = hub_folder.rename(tmp_path / "[v1]")
    with pytest.raises(ValueError, match=r"has brackets in its path, which it takes for a pattern"):
        make(DataSpec(source="hub", dataset=str(folder), vocab_size=300), tmp_path)


def test_a_file_of_another_type_is_another_corpus(tmp_path: Path, texts: list[str]) -> None:
    place = tmp_path / "posts.txt"
    place.write_text("\n".join(json.dumps({"content": text}) for text in texts))
    spec = DataSpec(source="files", paths=(str(tmp_path),), vocab_size=300, context=16)
    as_text = make(spec, tmp_path / "cache").facts()
    place.rename(tmp_path / "posts.jsonl")
    as_rows = make(spec, tmp_path / "cache").facts()
    assert (as_text["train_documents"], as_rows["train_documents"]) == (1, 57)


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path, texts: list[str]) -> None:
    whole = "\n".join(texts)
    (tmp_path / "all.txt").write_text(whole)
    corpus = make(DataSpec(source="files", paths=(str(tmp_path / "all.txt"),), vocab_size=300, context=16), tmp_path)
    facts, tokenizer = corpus.facts(), corpus.tokenizer()
    assert (facts["train_documents"], facts["validation_documents"]) == (1, 1)
    for split, part in (("train", whole[: -(len(whole) // 20)]), ("validation", whole[-(len(whole) // 20) :])):
        read = "".join(tokenizer.batch_decode(token_ids(corpus, split)))
        assert part.startswith(read)
        assert len(part) - len(read) < 16 * 10  # all but a tail too short for a block


def test_text_beyond_a_limit_and_blank_text_is_counted_and_said(
    spec: DataSpec, tmp_path: Path, texts: list[str]
) -> None:
    whole, size = make(spec, tmp_path).facts(), len(texts[0])
    assert (whole["train_documents"], whole["validation_documents"], whole["dropped"]["train"]) == (57, 3, {})
    Path(spec.paths[0], "blank.py").write_text("\n")
    pd.DataFrame({"content": [" ", texts[0]]}).to_parquet(Path(spec.paths[0], "z.parquet"))
    for limit, reason in (("max_bytes", "beyond data.max_bytes"), ("train_documents", "beyond the most documents")):
        most = 20 * size if limit == "max_bytes" else 20
        corpus = make(replace(spec, validation_documents=1, **{limit: most}), tmp_path)
        facts = corpus.facts()
        rest = 57 - facts["train_documents"]
        assert facts["dropped"]["train"] == {"empty": 2, "duplicate": 1, reason: rest}
        assert f"{rest} {reason}" in corpus.describe()
    assert facts["dropped"]["validation"] == {"beyond the most documents": 2}


@pytest.mark.parametrize("limits", [{"train_documents": 20}, {"max_bytes": 5000}])
def test_rows_beyond_a_limit_are_counted(hub_folder: Path, tmp_path: Path, limits) -> None:
    spec = DataSpec(source="hub", dataset=str(hub_folder), vocab_size=300, context=16, validation_documents=4, **limits)
    facts = make(spec, tmp_path).facts()
    assert facts["dropped"]["validation"] == {"beyond the most documents": 6}
    assert facts["train_documents"] + sum(facts["dropped"]["train"].values()) == 50


def test_a_document_larger_than_the_limit_is_cut_to_what_is_left(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "all.txt").write_text("".join(texts))
    spec = DataSpec(source="files", paths=(str(tmp_path / "all.txt"),), vocab_size=300, context=16, max_bytes=2000)
    assert make(spec, tmp_path).facts()["train_bytes"] == 2000

    def taken(sizes: list[int], most_bytes: int) -> list[int]:
        documents = ["x" * size for size in sizes]
        return [len(document) for document in limited(documents, most_documents=None, most_bytes=most_bytes)]

    assert taken([3, 4, 30, 1], 20) == [3, 4, 13]
    assert taken([20, 30], 20) == [20]
    assert taken([3, 4, 19, 1], 20) == [3, 4]  # as it always was: it alone is no larger than the limit


def test_blank_files_are_not_held_out(tmp_path: Path, texts: list[str]) -> None:
    for number, text in enumerate(texts[:20]):
        (tmp_path / f"{number}.py").write_text(text)
    for number in range(200):
        (tmp_path / f"__init__{number}.py").write_text("\n" * (number % 2))
    spec = DataSpec(source="files", paths=(str(tmp_path),), vocab_size=300, context=16)
    facts = make(spec, tmp_path).facts()
    assert (facts["train_documents"], facts["validation_documents"]) == (19, 1)


def test_parquet_text_and_validation_paths(tmp_path: Path, texts: list[str]) -> None:
    pd.DataFrame({"body": texts[:40]}).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "held.txt").write_text("".join(texts[39:]))
    (tmp_path / "copy.txt").write_text(texts[0])
    held = (str(tmp_path / "held.txt"), str(tmp_path / "copy.txt"))
    spec = DataSpec(source="files", paths=(str(tmp_path / "*.parquet"),), validation_paths=held, column="body")
    facts = make(replace(spec, vocab_size=300, context=16), tmp_path).facts()
    assert (facts["train_documents"], facts["validation_documents"]) == (39, 2)


@pytest.mark.parametrize("source", ["hub", "codeparrot"])
def test_data_sets_go_through_load_dataset(hub_folder: Path, tmp_path: Path, source) -> None:
    place = str(hub_folder)
    spec = DataSpec(source=source, dataset=place, validation_dataset=place, vocab_size=300, context=16)
    spec = replace(spec, train_documents=30, validation_documents=5)
    corpus = make(spec, tmp_path)
    facts = corpus.facts()
    assert (facts["train_documents"], facts["validation_documents"]) == (30, 5)
    assert set(facts["revisions"]) == {"train", "validation"}
    assert make(replace(spec, shuffle_seed=1), tmp_path).fingerprint != corpus.fingerprint


def test_data_that_would_fit_memory_is_read_from_disk_all_the_same(
    hub_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 2**30)  # HF_DATASETS_IN_MEMORY_MAX_SIZE
    facts = make(DataSpec(source="hub", dataset=str(hub_folder), vocab_size=300), tmp_path).facts()
    assert set(facts["revisions"]) == {"train", "validation"}


def test_another_data_set_than_codeparrot_validates_on_its_own(hub_folder: Path, tmp_path: Path) -> None:
    spec = DataSpec(source="codeparrot", dataset=str(hub_folder), validation_split="train[:20%]", context=16)
    assert make(replace(spec, vocab_size=300), tmp_path).facts()["validation_documents"] == 10


def test_no_training_document_of_a_data_set_is_a_validation_document(hub_folder: Path, tmp_path: Path) -> None:
    spec = DataSpec(source="hub", dataset=str(hub_folder), validation_split="train[:20%]", vocab_size=300, context=16)
    facts = make(spec, tmp_path).facts()
    assert (facts["train_documents"], facts["validation_documents"]) == (40, 10)
    assert facts["dropped"]["train"] == {"duplicate": 10}


def test_a_saved_tokenizer_is_used_as_it_is(spec: DataSpec, tmp_path: Path) -> None:
    first = make(spec, tmp_path)
    second = make(replace(spec, tokenizer=str(first.folder), vocab_size=999), tmp_path)
    assert second.fingerprint == first.fingerprint


def test_installed_code_makes_a_corpus_offline(tmp_path: Path) -> None:
    spec = DataSpec(
        vocab_size=400, context=64, max_bytes=300_000, max_bytes_per_package=50_000, validation_documents=10
    )
    corpus = make(spec, tmp_path)
    facts = corpus.facts()
    assert 200_000 < facts["train_bytes"] <= 300_000
    assert facts["validation_documents"] == 10
    assert facts["versions"]["packages"]["transformers"]
    assert make(spec, tmp_path / "again").fingerprint == corpus.fingerprint


def bad_specs(folder: Path) -> dict[str, tuple[DataSpec, str]]:
    base = DataSpec(source="files", paths=(str(folder),), vocab_size=300, context=16)
    (folder.parent / "empty").mkdir()
    (folder.parent / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder.parent / "broken.parquet").write_bytes(b"no parquet")
    (folder.parent / "blank.txt").write_text("\n")
    (folder.parent / "broken.jsonl").write_text("{")
    (folder.parent / "digits.jsonl").write_text('{"content": "a"}\n{"content": "b", "id": ' + 5000 * "7" + "}\n")
    (folder.parent / "depth.jsonl").write_text('{"content": "a", "tree": ' + 100_000 * "[" + 100_000 * "]" + "}\n")
    (folder.parent / "other.jsonl").write_text('{"text": "a", "title": "b"}')
    (folder.parent / "half.jsonl").write_text('{"content": "a"}\n{"content": "b\\ud83d"}\n')
    pd.DataFrame({"body": ["text"] * 1500 + [None]}).to_parquet(folder.parent / "rows.parquet")

    def at(name: str) -> DataSpec:
        return replace(base, paths=(str(folder.parent / name),))

    return {
        "no match": (at("missing/*.py"), "matches no file; allowed are"),
        "empty": (at("empty"), "matches no file; allowed are"),
        "not UTF-8": (at("latin.txt"), "is not UTF-8 text"),
        "parquet": (at("broken.parquet"), "broken.parquet cannot be read"),
        "json": (at("broken.jsonl"), "broken.jsonl line 1 is not JSON that can be read (Expecting"),
        "digits": (at("digits.jsonl"), "digits.jsonl line 2 is not JSON that can be read (Exceeds the limit"),
        "depth": (at("depth.jsonl"), "depth.jsonl line 1 is not JSON that can be read (maximum recursion"),
        "column": (at("other.jsonl"), "no column 'content'; set data.column to one of: text, title"),
        "surrogate": (at("half.jsonl"), "half.jsonl line 2: character 1 is no Unicode"),
        "row": (replace(at("rows.parquet"), column="body"), "rows.parquet row 1500: column 'body' holds NoneType"),
        "blank": (replace(base, validation_paths=(str(folder.parent / "blank.txt"),)), "gives no validation text"),
        "held out alone": (
            replace(base, validation_paths=base.paths),
            "left out: 60 duplicate (duplicates are those of held-out text too)",
        ),
        "long context": (replace(base, context=100_000), "fills no block of data.context=100000"),
        "vocabulary": (replace(base, vocab_size=50_000), "data.vocab_size=50000"),
        "little left": (replace(base, max_bytes=5), "the training text holds only 260 pieces"),
    }


BAD_CASES = ["no match", "empty", "not UTF-8", "parquet", "json", "column", "blank", "long context"]
BAD_CASES += ["held out alone", "digits", "depth", "surrogate", "row", "vocabulary", "little left"]


@pytest.mark.parametrize("case", BAD_CASES)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(text_folder: Path, tmp_path: Path, case: str) -> None:
    spec, message = bad_specs(text_folder)[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is checked below
        make(spec, tmp_path / "cache")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").glob("corpora/*")) == []


def test_an_unreachable_hub_name_is_refused_in_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing' cannot be loaded .* set HF_HOME, or use data=installed"):
        make(DataSpec(source="hub", dataset="nobody/nothing"), tmp_path)


def test_a_wrong_split_or_column_names_what_there_is(hub_folder: Path, tmp_path: Path) -> None:
    spec = DataSpec(source="hub", dataset=str(hub_folder), vocab_size=300)
    with pytest.raises(ValueError, match=r"split 'dev': .*train.*data.validation_split"):
        make(replace(spec, tokenizer=None, validation_split="dev"), tmp_path)
    with pytest.raises(ValueError, match=r"no column 'text'; set data.column to one of: content, path, repo_name"):
        make(replace(spec, column="text"), tmp_path)


def test_a_broken_file_of_a_data_set_is_refused_with_its_reason(hub_folder: Path, tmp_path: Path) -> None:
    for file in hub_folder.iterdir():
        file.unlink()
    (hub_folder / "train.jsonl").write_text('{"content": "a"}\n{"content": \n')
    with pytest.raises(ValueError, match=r"cannot be prepared \(ArrowInvalid: JSON parse error: .* in row 1\)"):
        make(DataSpec(source="hub", dataset=str(hub_folder)), tmp_path)


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("NORMFREE_CACHE")
    assert default_cache() == Path.home() / ".cache" / "normfree"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user without an entry, as in many containers
    with pytest.raises(ValueError, match=r"no home folder .* set NORMFREE_CACHE"):
        default_cache()
