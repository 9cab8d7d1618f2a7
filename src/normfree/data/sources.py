"""Where text comes from: each source is a generator of documents, as text, for training and for validation.

A source also states its `versions`, which decide together with the spec whether a prepared corpus may
be reused, and counts under a reason every document that it looked at and left out.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from glob import glob
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import datasets
import datasets.config
import datasets.exceptions
import pyarrow
import pyarrow.parquet

from normfree.data.scratch import NO_ROOM, free_room
from normfree.files import describe_files, fingerprint, sha256_bytes, sha256_file
from normfree.spec.run import DataSpec

Split = Literal["train", "validation"]

CODEPARROT_TRAIN = "huggingface-course/codeparrot-ds-train"
CODEPARROT_VALIDATION = "huggingface-course/codeparrot-ds-valid"
SUFFIXES = (".py", ".txt", ".jsonl", ".parquet")
HOLD_OUT_EVERY = 20
OVER_BYTES, OVER_DOCUMENTS = "beyond data.max_bytes", "beyond the most documents"
DISK_ERRORS = (*NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

log = logging.getLogger("normfree")


class Source(Protocol):
    """A way to get documents. `dropped` counts by reason what was looked at and left out."""

    @property
    def versions(self) -> dict[str, Any]:
        """What the text depends on besides the spec: package versions, revisions, hashes of files."""
        ...

    def documents(self, split: Split, dropped: Counter[str]) -> Iterator[str]:
        """The documents of a split, in an order that is the same on every machine."""
        ...


def normalised_hash(text: str) -> bytes:
    """sha256 of the text without trailing blanks, line ends and outer blank lines: equal for copies."""
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return bytes.fromhex(sha256_bytes(lines.encode("utf-8", "surrogatepass")))


def limited(
    documents: Iterable[str], *, most_documents: int | None, most_bytes: int | None, beyond: Counter[str] | None = None
) -> Iterator[str]:
    """Documents until the first one that would pass a limit (UTF-8 bytes); None is no limit.

    One that alone is larger than `most_bytes` is cut, so that it fills what is left. `beyond` counts the first one.
    """
    beyond = Counter() if beyond is None else beyond
    most = left = sys.maxsize if most_bytes is None else most_bytes
    for number, document in enumerate(documents):
        if number == most_documents:
            beyond[OVER_DOCUMENTS] += 1
            return
        encoded = document.encode()
        if len(encoded) > left:
            beyond[OVER_BYTES] += 1  # a part of it, where it is cut
            if left and len(encoded) > most:
                yield encoded[:left].decode(errors="ignore")
            return
        left -= len(encoded)
        yield document


def hashes_of_validation(source: Source) -> frozenset[bytes]:
    """What no training document may be."""
    return frozenset(map(normalised_hash, source.documents("validation", Counter())))


class FilesSource:
    """Local .py and .txt files (a file is a document), .jsonl and .parquet files (a row is a document).

    Files are ordered by content hash and seed, so names and places do not matter; blank ones are left out. Without
    validation paths every twentieth file is held out; of fewer files every twentieth document; of fewer documents the
    last twentieth of each. Exact duplicates are dropped, and a training document that validation holds as well.
    """

    def __init__(self, spec: DataSpec) -> None:
        self._spec = spec
        files, others = find_text_files(spec.paths, key="data.paths")
        train = self._ordered(files, others)
        self._left_out = {"train": others, "validation": Counter[str]()}
        self._held_out: Literal["files", "documents", "ends"] = "files"
        if spec.validation_paths:
            files, others = find_text_files(spec.validation_paths, key="data.validation_paths")
            validation = self._ordered(files, others)
            self._left_out["validation"] = others
        elif len(train) >= HOLD_OUT_EVERY:
            validation = train[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
            del train[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
        else:
            validation = train
            documents = len(list(islice(self._read(train, Counter()), HOLD_OUT_EVERY)))
            self._held_out = "documents" if documents == HOLD_OUT_EVERY else "ends"
        self._files = {"train": train, "validation": validation}

    def _ordered(self, paths: list[Path], left_out: Counter[str]) -> list[tuple[Path, str]]:
        hashed = [(path, sha256_file(path)) for path in paths if not _is_blank(path)]
        left_out.update({"empty": len(paths) - len(hashed)})
        return sorted(hashed, key=lambda file: sha256_bytes(f"{self._spec.shuffle_seed}:{file[1]}".encode()))

    @property
    def versions(self) -> dict[str, Any]:
        return {split: fingerprint([_version(*file) for file in files]) for split, files in self._files.items()}

    _validation_hashes = cached_property(hashes_of_validation)

    def documents(self, split: Split, dropped: Counter[str]) -> Iterator[str]:
        dropped.update(+self._left_out[split])
        seen = set(self._validation_hashes) if split == "train" else set()
        empty = dropped if split == "train" or self._held_out == "files" else Counter()  # counted once
        for number, whole in enumerate(self._read(self._files[split], empty), start=1):
            if self._held_out == "documents" and (number % HOLD_OUT_EVERY == 0) != (split == "validation"):
                continue
            document = _part(whole, split) if self._held_out == "ends" else whole
            digest = normalised_hash(document)
            if digest in seen:
                dropped["duplicate"] += 1
                continue
            seen.add(digest)
            yield document

    def _read(self, files: Iterable[tuple[Path, str]], dropped: Counter[str]) -> Iterator[str]:
        for path, _ in files:
            for text in read_texts(path, self._spec.column):
                if text.strip():
                    yield text
                else:
                    dropped["empty"] += 1


def _part(document: str, split: Split) -> str:
    """All but the last twentieth of a document, or that twentieth (in characters)."""
    end = len(document) - len(document) // HOLD_OUT_EVERY
    return document[:end] if split == "train" else document[end:]


def _version(path: Path, sha256: str) -> str | list[str]:
    """What a file is: its content, and for tables of rows its type, which says how they are read."""
    return [path.suffix, sha256] if path.suffix in (".jsonl", ".parquet") else sha256


def _is_blank(path: Path) -> bool:
    """True for a file of white space, such as an empty __init__.py."""
    with path.open("rb") as file:
        return not any(chunk.strip() for chunk in iter(lambda: file.read(2**16), b""))


def find_text_files(patterns: Iterable[str], *, key: str) -> tuple[list[Path], Counter[str]]:
    """Files behind paths, folders and globs, each real file once, and how many were left out why. What lies in hidden
    folders below a given one, such as .git and .venv, is left out, as globs leave it out.

    Raises ValueError for a pattern that matches none that can be read.
    """
    texts: dict[str, Path] = {}
    left_out: dict[str, set[str]] = {"broken link": set(), "of another type": set(), "hidden": set()}
    for pattern in patterns:
        files: set[Path] = set()
        hidden: set[str] = set()
        for place in _matching(pattern):
            files |= _files_below(place) if place.is_dir() else {place}
            hidden |= set(map(os.path.realpath, _files_below(place, hidden=True))) if place.is_dir() else set()
        # Of the names of one file the last counts: one that says how to read it.
        real = {
            os.path.realpath(file): file for file in sorted(files, key=lambda file: (file.suffix in SUFFIXES, file))
        }
        chosen = {name: file for name, file in real.items() if file.suffix in SUFFIXES and file.is_file()}
        left_out["hidden"] |= hidden - real.keys()
        if not chosen:
            rest = f"; {len(hidden)} hidden ones are left out unless their folder is given" if hidden else ""
            raise ValueError(
                f"{key}: {pattern!r} matches no file; allowed are folders or globs of {', '.join(SUFFIXES)}{rest}"
            )
        texts |= chosen
        for name in real.keys() - chosen.keys():
            left_out["of another type" if real[name].is_file() else "broken link"].add(name)
    counts = {reason: len(names - texts.keys()) for reason, names in left_out.items()}
    return sorted(texts.values()), +Counter(counts)


def _matching(pattern: str) -> Iterator[Path]:
    """What a path or glob names: as much of it as exists is a path, whatever brackets it has."""
    path = Path(pattern).expanduser()
    existing = next(place for place in (path, *path.parents) if place.exists())
    return _below(existing, path.relative_to(existing).parts)


def _below(place: Path, parts: Sequence[str]) -> Iterator[Path]:
    if parts in ((), ("**",)):
        yield place
    elif parts[0] == "**":
        for folder, _ in _real_folders(place):
            yield from _below(folder, parts[1:])
    else:
        for name in glob(parts[0], root_dir=place):  # noqa: PTH207, Path.glob takes hidden names too
            yield from _below(place / name, parts[1:])


def _files_below(folder: Path, *, hidden: bool = False) -> set[Path]:
    return {place / name for place, names in _real_folders(folder, hidden=hidden) for name in names}


def _real_folders(top: Path, *, hidden: bool = False) -> Iterator[tuple[Path, list[str]]]:
    """Each real folder at `top` or below once, through symbolic links and their loops, with the names of its files."""
    seen = {os.path.realpath(top)}
    for place, subfolders, names in os.walk(top, followlinks=True, onerror=_raise):
        shown = [name for name in sorted(subfolders) if hidden or name[0] != "."]
        real = {os.path.realpath(f"{place}/{name}"): name for name in reversed(shown)}
        subfolders[:] = [name for folder, name in real.items() if folder not in seen]
        seen |= real.keys()
        yield Path(place), [name for name in names if hidden or name[0] != "."]


def _raise(error: OSError) -> None:
    raise error


def read_texts(path: Path, column: str) -> Iterator[str]:
    """The texts of one file. Raises ValueError for a file that cannot be read as what its name says."""
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, column)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        where = f"{path} line {number}"
                        yield _text_of_row(_parsed(line, where=where), column, where=where)
        else:
            yield path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out") from None
    except (OSError, pyarrow.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}): mend it or leave it out") from None


def _parsed(line: str, *, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets, are JSON that Python refuses
        reason = getattr(error, "msg", str(error))
        raise ValueError(f"{where} is not JSON that can be read ({reason}): mend it or leave it out") from None


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as file:
        check_column(column, file.schema_arrow.names, where=str(path))
        batches = file.iter_batches(batch_size=1000, columns=[column])
        values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for number, value in enumerate(values):
            yield _checked_text(value, column, where=f"{path} row {number}")


def _text_of_row(row: object, column: str, *, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object with a column {column!r}")
    check_column(column, row, where=where)
    return _checked_text(row[column], column, where=where)


def _checked_text(value: object, column: str, *, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} holds {type(value).__name__}, not text; set data.column")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise ValueError(f"{where}: character {error.start} is no Unicode: mend it or leave it out") from None
    return value


def check_column(column: str, columns: Iterable[str], *, where: str) -> None:
    """Raises ValueError that names the columns there are."""
    if column not in columns:
        raise ValueError(f"{where} has no column {column!r}; set data.column to one of: {', '.join(sorted(columns))}")


class HubSource:
    """A Hugging Face data set by name, or a local folder that `datasets.load_dataset` understands.

    A prepared corpus of a hub name is reused without asking the hub again; the revision that it was
    made from stands in its manifest. Local folders are known by the hashes of their files.
    """

    def __init__(self, spec: DataSpec) -> None:
        codeparrot = spec.source == "codeparrot"
        train = spec.dataset or (CODEPARROT_TRAIN if codeparrot else "")
        validation = spec.validation_dataset or (CODEPARROT_VALIDATION if codeparrot and not spec.dataset else train)
        self._spec = spec
        self._places = {"train": (train, spec.train_split), "validation": (validation, spec.validation_split)}
        self._most = {"train": spec.train_documents, "validation": spec.validation_documents}
        self._loaded: dict[Split, datasets.Dataset] = {}
        self.rows_left = 0
        """How many rows `documents` has not come to."""

    @property
    def versions(self) -> dict[str, Any]:
        folders = {name: Path(name) for name, _ in self._places.values() if Path(name).is_dir()}
        content = {name: fingerprint(describe_files(folder)) for name, folder in folders.items()}
        return {split: content.get(name, name) for split, (name, _) in self._places.items()}

    @property
    def revisions(self) -> dict[str, str]:
        """The revision behind each split, as the cache of `datasets` names it; data in memory would name none."""
        loaded = {"train": self._load("train"), "validation": self._load("validation")}
        return {split: Path(rows.cache_files[0]["filename"]).parent.name for split, rows in loaded.items()}

    def documents(self, split: Split, dropped: Counter[str]) -> Iterator[str]:
        rows = self._load(split)
        name, part = self._places[split]
        check_column(self._spec.column, rows.column_names, where=f"{name} [{part}]")
        order = rows.select_columns([self._spec.column]).shuffle(seed=self._spec.shuffle_seed)
        # The paper's data sets stay as published; of any other, no training document may be a validation document.
        held_out = self._validation_hashes if split == "train" and self._spec.source == "hub" else frozenset()
        self.rows_left = min(len(order), self._most[split] or len(order))
        if len(order) > self.rows_left:
            dropped[OVER_DOCUMENTS] += len(order) - self.rows_left
        for row in order.select(range(self.rows_left)):
            self.rows_left -= 1
            text = _checked_text(cast(dict[str, Any], row)[self._spec.column], self._spec.column, where=name)
            if not text.strip():
                dropped["empty"] += 1
            elif normalised_hash(text) in held_out:
                dropped["duplicate"] += 1
            else:
                yield text

    _validation_hashes = cached_property(hashes_of_validation)

    def _load(self, split: Split) -> datasets.Dataset:
        if split in self._loaded:
            return self._loaded[split]
        name, part = self._places[split]
        told = "loading data set %s, split %s: what %s lacks is downloaded and converted first, without a bar"
        log.info(told, name, part, datasets.config.HF_DATASETS_CACHE)
        try:
            loaded = datasets.load_dataset(name, self._spec.dataset_config, split=part, keep_in_memory=False)
        except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            if reason := _reason_on_this_machine(error):
                cache = Path(datasets.config.HF_DATASETS_CACHE)
                raise ValueError(
                    f"data set {name!r} cannot be prepared ({reason}); it is kept in {cache}, where "
                    f"{free_room(cache)}; HF_HOME or HF_DATASETS_CACHE choose another place"
                ) from None
            if Path(name).is_dir():
                raise ValueError(
                    f"data set {name!r} cannot be loaded ({type(error).__name__}): the folder holds no data that "
                    "`datasets` reads, or has brackets in its path, which it takes for a pattern"
                ) from None
            raise ValueError(
                f"data set {name!r} cannot be loaded ({type(error).__name__}): it is no local folder, and "
                "the hub cannot be reached or does not know it; download it elsewhere and set HF_HOME, or "
                "use data=installed"
            ) from None
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"data set {name!r}, split {part!r}: {reason}; see data.dataset_config, data.train_split, "
                "data.validation_split and data.validation_dataset"
            ) from None
        self._loaded[split] = cast(datasets.Dataset, loaded)
        return self._loaded[split]


def _reason_on_this_machine(error: Exception) -> str | None:
    """The deepest cause in one line; None where the data set was not found or the hub not reached."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    of_the_disk = isinstance(cause, OSError) and (cause.errno in DISK_ERRORS or "disk space" in str(cause))
    if isinstance(error, OSError) and not of_the_disk:
        return None
    return " ".join(f"{type(cause).__name__}: {cause}".split())
