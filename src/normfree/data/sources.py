"""Text sources: local files and Hugging Face data sets.

Each source yields documents for training and for validation, states its `versions` (with the spec they decide whether a
prepared corpus may be reused), and counts every document that it leaves out under a reason.
"""

import json
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import datasets.config
import datasets.exceptions
import pyarrow
import pyarrow.parquet

from normfree.files import describe_files, fingerprint, sha256_bytes, sha256_file
from normfree.spec.run import DataSpec

Split = Literal["train", "validation"]

CODEPARROT_TRAIN = "huggingface-course/codeparrot-ds-train"
CODEPARROT_VALIDATION = "huggingface-course/codeparrot-ds-valid"
ROWS = (".jsonl", ".parquet")
SUFFIXES = (".py", ".txt", *ROWS)
HOLD_OUT_EVERY = 20

log = logging.getLogger("normfree")


def normalised_hash(text: str) -> bytes:
    """sha256 of the text without trailing blanks, line ends and outer blank lines: equal for copies."""
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return bytes.fromhex(sha256_bytes(lines.encode("utf-8", "surrogatepass")))


class Source(ABC):
    """Yields documents; `dropped` counts the documents left out, by reason."""

    versions: dict[str, Any]
    """Package versions, names of data sets and hashes of files: the text depends on these and the spec."""

    @abstractmethod
    def documents(self, split: Split, dropped: Counter[str]) -> Iterator[str]:
        """Yield the documents of a split, in the same order on every machine."""

    @cached_property
    def validation_hashes(self) -> frozenset[bytes]:
        """Hashes of all validation documents, which training must not repeat."""
        return frozenset(map(normalised_hash, self.documents("validation", Counter())))


def limited(
    documents: Iterable[str], *, most_documents: int | None, most_bytes: int | None, dropped: Counter[str]
) -> Iterator[str]:
    """Yield documents until one would exceed a limit (None: no limit).

    A document that alone has more than `most_bytes` UTF-8 bytes is cut to the bytes that remain. `dropped` counts that
    there was more.
    """
    most = remaining = sys.maxsize if most_bytes is None else most_bytes
    for document in islice(documents, most_documents):
        encoded = document.encode()
        if len(encoded) > remaining:
            dropped["at data.max_bytes and all after it"] += 1
            if remaining and len(encoded) > most:
                yield encoded[:remaining].decode(errors="ignore")
            return
        remaining -= len(encoded)
        yield document


class FilesSource(Source):
    """Local .py and .txt files (one document each) and .jsonl and .parquet files (one document per row).

    Files are ordered by content hash and seed, so names and places do not matter. Without validation paths every
    twentieth file is held out; with fewer than 20 files every twentieth document; with fewer than 20 documents the last
    twentieth of each. Blank files and exact duplicates are left out, also duplicates of validation documents.
    """

    def __init__(self, spec: DataSpec) -> None:
        self._spec = spec
        self._left_out: dict[Split, Counter[str]] = {"train": Counter(), "validation": Counter()}
        train = self._ordered_files("train", spec.paths, "data.paths")
        self._held_out: Literal["files", "documents", "ends"] = "files"
        if spec.validation_paths:
            validation = self._ordered_files("validation", spec.validation_paths, "data.validation_paths")
        elif len(train) >= HOLD_OUT_EVERY:
            validation = train[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
            del train[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
        else:
            validation = train
            documents = len(list(islice(self._read(train, Counter()), HOLD_OUT_EVERY)))
            self._held_out = "documents" if documents == HOLD_OUT_EVERY else "ends"
        self._files = {"train": train, "validation": validation}
        self.versions = {  # suffixes decide how rows are read
            split: fingerprint([[file.suffix, sha256] if file.suffix in ROWS else sha256 for file, sha256 in files])
            for split, files in self._files.items()
        }

    def _ordered_files(self, split: Split, patterns: Iterable[str], key: str) -> list[tuple[Path, str]]:
        """The files behind `patterns` with their sha256; blank ones and those of other types are counted."""
        paths, self._left_out[split]["of another type"] = find_text_files(patterns, key=key)
        hashed = [(path, sha256_file(path)) for path in paths if not _is_blank(path)]
        self._left_out[split]["empty"] = len(paths) - len(hashed)
        seed = self._spec.shuffle_seed
        return sorted(hashed, key=lambda file: sha256_bytes(f"{seed}:{file[1]}".encode()))

    def documents(self, split: Split, dropped: Counter[str]) -> Iterator[str]:
        """Yield the documents of a split, each text once."""
        dropped.update(+self._left_out[split])
        seen = set(self.validation_hashes) if split == "train" else set()
        # Splits that share their files count a blank document once.
        empty = dropped if split == "train" or self._held_out == "files" else Counter()
        for number, document in enumerate(self._read(self._files[split], empty), start=1):
            if self._held_out == "documents" and (number % HOLD_OUT_EVERY == 0) != (split == "validation"):
                continue
            end = len(document) - len(document) // HOLD_OUT_EVERY if self._held_out == "ends" else None
            text = document[:end] if split == "train" or end is None else document[end:]
            if (digest := normalised_hash(text)) in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(digest)
                yield text

    def _read(self, files: Iterable[tuple[Path, str]], dropped: Counter[str]) -> Iterator[str]:
        for path, _ in files:
            for text in read_texts(path, self._spec.column):
                if text.strip():
                    yield text
                else:
                    dropped["empty"] += 1


def _is_blank(path: Path) -> bool:
    """True for a file of white space, such as an empty __init__.py."""
    with path.open("rb") as file:
        return not any(chunk.strip() for chunk in iter(lambda: file.read(2**16), b""))


def find_text_files(patterns: Iterable[str], *, key: str) -> tuple[list[Path], int]:
    """The text files behind paths, folders and globs, and the number of files of other types.

    Symbolic links are followed, and each real file counts once. What is hidden below a folder, such as .git and .venv,
    is passed over. A pattern that exists is a path, even if it contains brackets. Raises ValueError for one without a
    text file.
    """
    texts: dict[str, Path] = {}
    reals: set[str] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        places = [path] if path.exists() else map(Path, sorted(glob(str(path), recursive=True)))  # noqa: PTH207, finds no hidden
        files = {os.path.realpath(file): file for place in places for file in _files_at(place)}
        matching = {real: file for real, file in files.items() if file.suffix in SUFFIXES and file.is_file()}
        if not matching:
            kinds = sorted({file.suffix or file.name for file in files.values() if file.is_file()})
            reason = f"only files of kinds that are not read ({', '.join(kinds)})" if kinds else "no file"
            allowed = f"allowed are folders or globs of {', '.join(SUFFIXES)}, hidden ones only by name"
            raise ValueError(f"{key}: {pattern!r} matches {reason}; {allowed}")
        texts |= matching
        reals |= files.keys()
    return sorted(texts.values()), len(reals - texts.keys())


def _files_at(place: Path) -> Iterator[Path]:
    """A file, or the files below a folder that are not hidden, through all links, each real folder once."""

    def stop(error: OSError) -> None:
        raise error

    if not place.is_dir():
        yield place
        return
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(place, followlinks=True, onerror=stop):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")


def read_texts(path: Path, column: str) -> Iterator[str]:
    """Yield the texts of one file. Raises ValueError for a file that its suffix does not describe."""
    number = 0
    try:
        if path.suffix not in ROWS:
            yield path.read_bytes().decode()
            return
        for number, row in enumerate(_rows(path, column), start=1):
            if row is not None:
                yield text_of(row, column, where=f"{path} row {number}")
    except (UnicodeDecodeError, json.JSONDecodeError, OSError, pyarrow.ArrowInvalid) as error:
        place, reason = f" from row {number + 1} on" if path.suffix in ROWS else "", str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read{place} ({reason}): repair it or leave it out") from None


def _rows(path: Path, column: str) -> Iterator[Any]:
    """The rows of a .jsonl or .parquet file; None for a blank line."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8-sig") as lines:
            yield from (json.loads(line) if line.strip() else None for line in lines)
    else:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for batch in file.iter_batches(batch_size=1000, columns=[column] if column in names else names):
                yield from batch.to_pylist()


def text_of(row: Any, column: str, *, where: str) -> str:
    """The text in a column of a row. Raises ValueError, with the columns there are, if it has none."""
    names = sorted(row) if isinstance(row, dict) else []
    if column not in names:
        raise ValueError(f"{where} has no column {column!r}; set data.column to one of: {', '.join(names)}")
    if (text := row[column]) is None:  # counted as empty
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: column {column!r} holds {type(text).__name__}, not text; set data.column")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise ValueError(f"{where}: character {error.start} is not Unicode: repair it or leave it out") from None
    return text


class HubSource(Source):
    """A Hugging Face data set by name, or a local folder that `datasets.load_dataset` reads.

    A prepared corpus of a hub name is reused without asking the hub again; its manifest records the revision. Local
    folders are identified by the hashes of their files.
    """

    def __init__(self, spec: DataSpec) -> None:
        codeparrot = spec.source == "codeparrot"
        train = spec.dataset or (CODEPARROT_TRAIN if codeparrot else "")
        validation = spec.validation_dataset or (CODEPARROT_VALIDATION if codeparrot and not spec.dataset else train)
        self._spec = spec
        self._loaded: dict[Split, datasets.Dataset] = {}
        self._places: dict[Split, tuple[str, str]] = {"train": (train, spec.train_split)}
        self._places["validation"] = (validation, spec.validation_split)
        self.versions = {
            split: fingerprint(describe_files(Path(name))) if Path(name).is_dir() else name
            for split, (name, _) in self._places.items()
        }

    @property
    def revisions(self) -> dict[str, str]:
        """The revision of each split, as the cache of `datasets` names it."""
        return {split: Path(self.load(split).cache_files[0]["filename"]).parent.name for split in self._places}

    def documents(self, split: Split, dropped: Counter[str]) -> Iterator[str]:
        """Yield the shuffled documents of a split, at most as many as the spec allows."""
        rows, column = self.load(split), self._spec.column
        if column in rows.column_names:
            rows = rows.select_columns([column])
        most = min(len(rows), getattr(self._spec, f"{split}_documents") or len(rows))
        # CodeParrot stays as published; in any other data set no training document may be a validation document.
        held_out = self.validation_hashes if split == "train" and self._spec.source == "hub" else frozenset()
        for row in rows.shuffle(seed=self._spec.shuffle_seed).select(range(most)):
            text = text_of(row, column, where=self._places[split][0])
            if not text.strip():
                dropped["empty"] += 1
            elif normalised_hash(text) in held_out:
                dropped["duplicate"] += 1
            else:
                yield text

    def load(self, split: Split) -> datasets.Dataset:
        """The rows of a split as published. Raises ValueError, with the cause, for what cannot be loaded."""
        if split in self._loaded:
            return self._loaded[split]
        name, part = self._places[split]
        cache = datasets.config.HF_DATASETS_CACHE
        log.info("loading data set %s, split %s: downloads and converts what %s does not have", name, part, cache)
        try:  # in memory there would be no file that names the revision
            loaded = datasets.load_dataset(name, self._spec.dataset_config, split=part, keep_in_memory=False)
        except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # `datasets` hides a full disk or a broken file behind its own errors
                cause = cause.__cause__
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())
            problem = f"data set {name!r}, split {part!r}, cannot be loaded ({reason})"
            advice = "check the name, the split and data.dataset_config; without a network download it elsewhere"
            raise ValueError(f"{problem}: {advice}; HF_HOME moves its cache from {cache}") from None
        self._loaded[split] = cast(datasets.Dataset, loaded)
        return self._loaded[split]
