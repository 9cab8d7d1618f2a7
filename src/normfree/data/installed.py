"""The offline default text: Python files of the standard library and of the runtime packages on this machine.

`installed.json` lists the distributions of requirements.lock, except those that became dependencies after the committed
results were made (`not_read`), and the top-level packages of the validation split. A package lies in one split as a
whole. The text depends on the versions of Python and of every package, so `versions` contains them.
"""

import json
import logging
import math
import os
import platform
import re
import string
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files as resources
from pathlib import Path, PurePosixPath

from normfree.data.sources import Source, Split, limited, normalised_hash
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
GENERATED = re.compile(r"auto(-?\s?|matically )generated|generated (by|from|with)|do not (edit|modify)", re.I)
GENERATED_LINES = 10

TEST_FOLDERS = {"test", "tests", "idle_test", "__tests__"}
VENDORED_FOLDERS = {
    *("_vendor", "_vendored", "vendor", "vendored", "extern", "externals", "third_party"),
    *("site-packages", "dist-packages", "ensurepip"),
}
# Facts of one build (version, compiler, CPU or CUDA), which would make the corpus depend on it.
BUILD_FILES = re.compile(r"_?version\.py|__config__\.py|_sysconfigdata.*\.py")

log = logging.getLogger("normfree")


def installed_facts() -> dict[str, list[str]]:
    """Load installed.json: `distributions` and `not_read`, together requirements.lock, and `validation` (packages)."""
    return json.loads(resources("normfree.data").joinpath("installed.json").read_text(encoding="utf-8"))


def held_out_text() -> str:
    """At most about 1 MB of Python code from the validation packages, documents joined by blank lines."""
    documents = InstalledSource(DataSpec(source="installed")).documents("validation", Counter())
    return "\n\n".join(limited(documents, most_documents=None, most_bytes=1_000_000, dropped=Counter()))


def excluded_path(name: str) -> str | None:
    """Why a file is left out by its path, or None. `name` is relative to a folder on sys.path."""
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
    # Deleting bytes is 30 times faster than testing each character, as those beyond ASCII are.
    letters = len(content) - len(content.translate(None, ALPHANUMERIC))
    if not text.isascii():
        letters += sum(map(str.isalnum, ASCII.sub("", text)))
    if 1 - (len(text) - letters) / len(text) < LEAST_ALPHANUMERIC_SHARE:
        return "few letters"
    head = "\n".join(text.split("\n", GENERATED_LINES)[:GENERATED_LINES])
    return "generated" if GENERATED.search(head) else None


class InstalledSource(Source):
    """The files of `installed.json`. Validation is read completely; a training file that repeats it is dropped."""

    def __init__(self, spec: DataSpec) -> None:
        self._spec = spec
        facts, packages = installed_facts(), {}
        self._held_out = frozenset(facts["validation"])
        for name in facts["distributions"]:
            try:
                packages[name] = distribution(name).version.split("+")[0]
            except PackageNotFoundError:
                log.warning("%s is not installed, so it is not in the corpus", name)
        python = platform.python_version()
        self.versions = {"python": python, "packages": packages, "validation": sorted(self._held_out)}

    @cached_property
    def _paths(self) -> list[tuple[str, str]]:
        """Name and place of every Python file, ordered by the hash of seed and name."""
        library = sysconfig.get_path("stdlib")
        paths: dict[str, str] = {}
        for folder, subfolders, names in os.walk(library):
            # Packages installed there are not the library's, and perhaps not locked.
            subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
            within = "" if folder == library else Path(folder).relative_to(library).as_posix() + "/"
            paths |= {within + name: f"{folder}/{name}" for name in names if name.endswith(".py")}
        for name in self.versions["packages"]:
            package = distribution(name)
            files = [file.as_posix() for file in package.files or () if file.suffix == ".py" and ".." not in file.parts]
            paths |= {file: str(package.locate_file(file)) for file in files}
        seed = self._spec.shuffle_seed
        return sorted(paths.items(), key=lambda item: sha256_bytes(f"{seed}:{item[0]}".encode()))

    def documents(self, split: Split, dropped: Counter[str]) -> Iterator[str]:
        """Yield the files of a split that pass every filter, each text once."""
        seen = set(self.validation_hashes) if split == "train" else set()
        room = self._spec.max_bytes_per_package
        package_bytes: Counter[str] = Counter()
        for name, place in self._paths:
            package = name.partition("/")[0].removesuffix(".py")
            if (package in self._held_out) != (split == "validation"):
                continue
            left = math.inf if room is None else room - package_bytes[package]
            text, reason = _read(name, Path(place), most_bytes=left)
            digest = b"" if reason else normalised_hash(text)
            if reason or digest in seen:
                dropped[reason or "duplicate"] += 1
                continue
            seen.add(digest)
            package_bytes[package] += len(text.encode())
            yield text


def _read(name: str, path: Path, *, most_bytes: float) -> tuple[str, str | None]:
    """The text of a file, and why it is left out or None."""
    if reason := excluded_path(name):
        return "", reason
    if not path.is_file():
        return "", "missing"
    if path.stat().st_size > most_bytes:
        return "", "package full"
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return "", "not UTF-8"
    return text, excluded_text(text)
