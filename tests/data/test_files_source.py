"""Local files: which are found, what is held out, what is left out and counted, and bad input."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from normfree.data.sources import find_text_files, limited, read_texts
from normfree.spec.run import DataSpec
from tests.data.prepare import make, token_ids


def spec_of(*paths: Path) -> DataSpec:
    return DataSpec(source="files", paths=tuple(map(str, paths)), vocab_size=300, context=16)


def documents(facts: dict) -> tuple[int, int]:
    return facts["train_documents"], facts["validation_documents"]


def write_files(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(name)
    return [root / name for name in names]


def test_files_of_other_types_are_counted(tmp_path: Path, texts: list[str]) -> None:
    for name in ("a.py", "b.md", "c.txt", "d.rst"):
        (tmp_path / name).write_text("\n".join(texts[:30] if name == "a.py" else texts[30:]))
    corpus = make(spec_of(tmp_path), tmp_path / "cache")
    assert corpus.facts()["dropped"]["train"] == {"of another type": 2}
    assert "left out   2 of another type" in corpus.describe()


def test_hidden_files_need_their_folder_named(tmp_path: Path) -> None:
    shown, hidden, _, _ = write_files(tmp_path, "project/a.py", "project/.venv/b.py", "project/.git/c", "project/.d.py")
    assert find_text_files([str(tmp_path / "project")], key="data.paths") == ([shown], 0)
    assert find_text_files([str(hidden.parent)], key="data.paths")[0] == [hidden]


@pytest.mark.parametrize("pattern", ["project", "project/**", "project/**/*.txt", "project/**/**/*.txt"])
def test_links_are_followed_and_files_read_once(tmp_path: Path, pattern: str) -> None:
    files = write_files(tmp_path, "elsewhere/a.txt", "project/b.txt", "project/below/c.txt", "project/.git/d.txt")
    links = {"project/linked": "elsewhere", **({} if "*" in pattern else {"project/below/loop": "project"})}
    links |= {"project/below/name.txt": "project/b.txt", "project/gone.txt": "nowhere", "project/.git/out": "elsewhere"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    matching, left_out = find_text_files([str(tmp_path / pattern)], key="data.paths")
    assert sorted(file.resolve() for file in matching) == sorted(files[:3])
    assert left_out == 1  # the broken link


@pytest.mark.parametrize("pattern", ["x/[v1]", "x/[v1]/a.txt", "x/b[2].txt", "x/c?"])
def test_an_existing_path_is_no_pattern(tmp_path: Path, pattern: str) -> None:
    write_files(tmp_path, "x/[v1]/a.txt", "x/b[2].txt", "x/b2.txt", "x/v/d.txt", "x/c?/e.txt", "x/cc/f.txt")
    (file,), _ = find_text_files([str(tmp_path / pattern)], key="data.paths")
    assert file.is_relative_to(tmp_path / pattern)


def test_few_files_hold_out_documents_as_suffixes_say(tmp_path: Path, texts: list[str]) -> None:
    place = tmp_path / "posts.txt"
    place.write_text("\n".join(json.dumps({"content": text}) for text in [*texts, texts[0]]))
    assert make(spec_of(tmp_path), tmp_path / "cache").facts()["train_documents"] == 1
    place.rename(tmp_path / "posts.jsonl")
    facts = make(spec_of(tmp_path / "*.jsonl"), tmp_path / "cache").facts()
    assert documents(facts) == (57, 3)
    assert facts["dropped"] == {"train": {"duplicate": 1}, "validation": {}}


def test_a_single_file_holds_out_its_end(tmp_path: Path, texts: list[str]) -> None:
    whole = "\n".join(texts)
    (tmp_path / "all.txt").write_text(whole)
    corpus = make(spec_of(tmp_path / "all.txt"), tmp_path)
    assert documents(corpus.facts()) == (1, 1)
    for split, part in (("train", whole[: -(len(whole) // 20)]), ("validation", whole[-(len(whole) // 20) :])):
        decoded = "".join(corpus.tokenizer().batch_decode(token_ids(corpus, split)))
        assert part.startswith(decoded)
        assert len(part) - len(decoded) < 16 * 10  # all but a tail that fills no block


def test_blank_files_are_not_held_out(tmp_path: Path, texts: list[str]) -> None:
    for number, text in enumerate(texts[:20]):
        (tmp_path / f"{number}.py").write_text(text)
    for number in range(200):
        (tmp_path / f"__init__{number}.py").write_text("\n" * (number % 2))
    assert documents(make(spec_of(tmp_path), tmp_path).facts()) == (19, 1)


def test_parquet_text_and_validation_paths(tmp_path: Path, texts: list[str]) -> None:
    pd.DataFrame({"body": texts[:40]}).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "held.txt").write_text("".join(texts[39:]))
    (tmp_path / "copy.txt").write_text(texts[0])
    held_out = (str(tmp_path / "held.txt"), str(tmp_path / "copy.txt"))
    spec = replace(spec_of(tmp_path / "*.parquet"), validation_paths=held_out, column="body")
    assert documents(make(spec, tmp_path).facts()) == (39, 2)


@pytest.mark.parametrize("limit", ["max_bytes", "train_documents"])
def test_text_stops_at_a_limit(spec: DataSpec, tmp_path: Path, texts: list[str], limit: str) -> None:
    Path(spec.paths[0], "blank.py").write_text("\n")
    most = 20 * len(texts[0]) if limit == "max_bytes" else 20
    facts = make(replace(spec, validation_documents=1, **{limit: most}), tmp_path).facts()
    assert facts["train_bytes" if limit == "max_bytes" else limit] <= most
    assert facts["validation_documents"] == 1
    behind = {"at data.max_bytes and all after it": 1} if limit == "max_bytes" else {}
    assert facts["dropped"] == {"train": {"empty": 1, **behind}, "validation": {}}


@pytest.mark.parametrize(
    ("sizes", "taken"),
    [([3, 4, 30, 1], [3, 4, 13]), ([20, 30], [20]), ([3, 4, 19, 1], [3, 4])],
    ids=["cut because it alone is too large", "nothing left to cut to", "not cut because it alone fits"],
)
def test_only_documents_above_the_limit_are_cut(sizes: list[int], taken: list[int]) -> None:
    texts = limited(["x" * size for size in sizes], most_documents=None, most_bytes=20, dropped=Counter())
    assert [len(text) for text in texts] == taken


BAD_FILES = {
    "latin.txt": ("caf\u00e9".encode("latin-1"), "latin.txt cannot be read ('utf-8' codec can't decode"),
    "broken.parquet": (b"no parquet", "broken.parquet cannot be read from row 1 on ("),
    "broken.jsonl": (b"{", "broken.jsonl cannot be read from row 1 on (Expecting"),
    "list.jsonl": (b"[1]", "list.jsonl row 1 has no column 'content'"),
    "other.jsonl": (b'{"text": "a", "title": "b"}', "no column 'content'; set data.column to one of: text, title"),
    "half.jsonl": (b'{"content": "a"}\n{"content": "b\\ud83d"}\n', "half.jsonl row 2: character 1 is not Unicode"),
    "number.jsonl": (b'{"content": 3}', "row 1: column 'content' holds int, not text; set data.column"),
    "blank.txt": (b"\n", "gives no train text"),
    "missing/*.py": (None, "matches no file; allowed are"),
    "empty": (None, "matches no file; allowed are"),
    "notes.md": (b"text", "matches only files of kinds that are not read (.md); allowed are folders or globs of .py, "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / "empty").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is checked below
        make(spec_of(tmp_path / name), tmp_path / "cache")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").glob("corpora/*")) == []


def test_a_missing_column_of_parquet_is_named(tmp_path: Path) -> None:
    pd.DataFrame({"body": ["text"] * 1500 + [None]}).to_parquet(tmp_path / "rows.parquet")
    assert [*read_texts(tmp_path / "rows.parquet", "body")][-2:] == ["text", ""]
    with pytest.raises(ValueError, match=r"no column .content.; set data.column to one of: body"):
        make(spec_of(tmp_path / "rows.parquet"), tmp_path)


def test_validation_text_cannot_be_all_training_text(spec: DataSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gives no train text; left out: 60 duplicate"):
        make(replace(spec, validation_paths=spec.paths), tmp_path)
