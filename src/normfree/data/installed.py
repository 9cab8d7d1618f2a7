"""The offline default: Python files of the standard library and of the runtime packages on this machine.

`installed.json` is a committed list: the distributions of requirements.lock, apart from those that became dependencies
after results were made from this text (`not_read`), and the top-level packages that validation holds. A package lies
in one split as a whole. The text depends on the version of Python and of every package, which is why they are part of
`versions`.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import platform
import re
import string
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from normfree.data.sources import Split, hashes_of_validation, limited, normalised_hash
from normfree.files import sha256_bytes
from normfree.spec.run import DataSpec

# Filters as CodeParrot describes them (https://huggingface.co/datasets/codeparrot/codeparrot-clean).
SMALLEST_FILE_BYTES = 100
LARGEST_FILE_BYTES = 1_000_000
LONGEST_LINE = 1000
LONGEST_MEAN_LINE = 100
LEAST_ALPHANUMERIC_SHARE = 0.25
ALPHANUMERIC = (string.ascii_letters + string.digits).encode()
ASCII = re.compile(r"[\x00-\x7f]+")
GENERATED = re.compile(
    r"auto-?\s?generated|generated (by|from|with)|automatically generated|do not (edit|modify)", re.I
)
GENERATED_LINES = 10

TEST_FOLDERS = {"test", "tests", "idle_test", "__tests__"}
VENDORED_FOLDERS = {
    *("_vendor", "_vendored", "vendor", "vendored", "extern", "externals", "third_party"),
    *("site-packages", "dist-packages", "ensurepip"),
}
# Facts of one build (version, compiler, CPU or CUDA), which would tie the corpus to it.
BUILD_FILES = re.compile(r"_?version\.py|__config__\.py|_sysconfigdata.*\.py")

log = logging.getLogger("normfree")


def installed_facts() -> dict[str, list[str]]:
    """The committed lists: `distributions` and `not_read`, together requirements.lock, and `validation` (packages)."""
    return json.loads(files("normfree.data").joinpath("installed.json").read_text(encoding="utf-8"))


def held_out_text() -> str:
    """At most about 1 MB of Python code from the validation packages, documents joined by blank lines."""
    documents = InstalledSource(DataSpec(source="installed")).documents("validation", Counter())
    return "\n\n".join(limited(documents, most_documents=None, most_bytes=1_000_000))


def excluded_path(name: str) -> str | None:
    """Why a file is left out by its path, or None. `name` is relative to the folder that is on sys.path."""
    path = PurePosixPath(name)
    folders = set(path.parts[:-1])
    if folders & TEST_FOLDERS or path.name.startswith("test_") or path.name in ("test.py", "conftest.py"):
        return "test"
    if folders & VENDORED_FOLDERS:
        return "vendored"
    return "build facts" if BUILD_FILES.fullmatch(path.name) else None


def excluded_text(text: str) -> str | None:
    """Why a file is left out by its text, or None: size, line length, share of letters, generated."""
    content = text.encode()
    if len(content) < SMALLEST_FILE_BYTES:
        return "small"
    if len(content) > LARGEST_FILE_BYTES:
        return "large"
    lengths = [len(line) for line in text.splitlines()]
    if max(lengths) > LONGEST_LINE:
        return "long line"
    if sum(lengths) / len(lengths) > LONGEST_MEAN_LINE:
        return "long lines on average"
    # Deleting bytes is 30 times faster than asking each character, which only those beyond ASCII are.
    letters = len(content) - len(content.translate(None, ALPHANUMERIC))
    if not text.isascii():
        letters += sum(map(str.isalnum, ASCII.sub("", text)))
    if 1 - (len(text) - letters) / len(text) < LEAST_ALPHANUMERIC_SHARE:
        return "few letters"
    head = "\n".join(text.split("\n", GENERATED_LINES)[:GENERATED_LINES])
    return "generated" if GENERATED.search(head) else None


class InstalledSource:
    """Python files of this interpreter's standard library and of the distributions in `installed.json`.

    Validation is read first and whole, so it does not change with `max_bytes`; a training file that
    repeats a validation file is dropped.
    """

    def __init__(self, spec: DataSpec) -> None:
        self._spec = spec
        self._facts = installed_facts()
        self._held_out = frozenset(self._facts["validation"])

    @cached_property
    def versions(self) -> dict[str, Any]:
        found, missing = {}, []
        for name in self._facts["distributions"]:
            try:
                found[name] = distribution(name).version.split("+")[0]
            except PackageNotFoundError:
                missing.append(name)
        if missing:
            log.warning("not installed, so not in the corpus: %s", ", ".join(missing))
        return {"python": platform.python_version(), "packages": found, "validation": sorted(self._held_out)}

    @cached_property
    def _paths(self) -> list[tuple[str, str]]:
        """Name and place of every Python file, in a seeded order that its name decides."""
        library = sysconfig.get_path("stdlib")
        paths: dict[str, str] = {}
        for folder, subfolders, names in os.walk(library):
            # What is installed there is not the library's, and perhaps not locked.
            subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
            within = "" if folder == library else Path(folder).relative_to(library).as_posix() + "/"
            paths |= {within + name: f"{folder}/{name}" for name in names if name.endswith(".py")}
        for name in self.versions["packages"]:
            paths |= _python_files(distribution(name))
        seed = self._spec.shuffle_seed
        return sorted(paths.items(), key=lambda item: sha256_bytes(f"{seed}:{item[0]}".encode()))

    _validation_hashes = cached_property(hashes_of_validation)

    def documents(self, split: Split, dropped: Counter[str]) -> Iterator[str]:
        seen = set(self._validation_hashes) if split == "train" else set()
        room = self._spec.max_bytes_per_package
        taken_bytes: Counter[str] = Counter()
        for name, place in self._paths:
            package = name.partition("/")[0].removesuffix(".py")
            if (package in self._held_out) != (split == "validation"):
                continue
            path = Path(place)
            text, reason = "", excluded_path(name) or (None if path.is_file() else "missing")
            size = 0 if reason else path.stat().st_size
            if reason is None and room is not None and taken_bytes[package] + size > room:
                reason = "package full"
            if reason is None:
                text, reason = _read(path)
            digest = b"" if reason else normalised_hash(text)
            if digest in seen:
                reason = "duplicate"
            if reason is not None:
                dropped[reason] += 1
                continue
            seen.add(digest)
            taken_bytes[package] += size
            yield text


def _python_files(installed: Distribution) -> dict[str, str]:
    """Names and places of its Python files. Reading RECORD here is six times faster than `installed.files`."""
    record = installed.read_text("RECORD")
    rows = csv.reader((record or "").splitlines())
    names = [row[0] for row in rows if row] if record else [file.as_posix() for file in installed.files or []]
    site = installed.locate_file("")
    return {name: f"{site}/{name}" for name in names if name.endswith(".py") and ".." not in name.split("/")}


def _read(path: Path) -> tuple[str, str | None]:
    """The text of a file and why it is left out (None keeps it)."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return "", "not UTF-8"
    return text, excluded_text(text)
