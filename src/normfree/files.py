"""Hashes, atomic writes, manifests and locks.

A manifest is a JSON file with the sha256 and size of every other file in its folder; it is written last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"


def default_cache() -> Path:
    """Where corpora lie: the environment variable NORMFREE_CACHE, else ~/.cache/normfree."""
    return Path(os.environ.get("NORMFREE_CACHE") or Path.home() / ".cache" / "normfree")


def sha256_bytes(content: bytes) -> str:
    """Hexadecimal sha256 of `content`."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """sha256 of the JSON of `value` with sorted keys and no spaces. Raises ValueError for NaN."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write the whole file or leave the old one: temporary name, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make the content of a file, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_under(folder: Path) -> list[Path]:
    """Every file under `folder` except its manifest, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)


def describe_files(folder: Path, paths: Iterable[Path] | None = None) -> dict[str, dict[str, Any]]:
    """`{relative path: {"sha256": ..., "bytes": ...}}` of `paths` (default: every file under `folder`)."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in (files_under(folder) if paths is None else paths)
    }


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Sync and hash every file under `folder`, and write the manifest last.

    It has `facts`, the key "files", and the key "seal": a fingerprint of the rest, which reveals damage to itself.
    """
    for path in files_under(folder):
        sync(path)
    content = {**facts, "files": describe_files(folder)}
    manifest = {**content, "seal": fingerprint(content)}
    write_atomically(folder / MANIFEST_NAME, json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False))


def make_readable(folder: Path) -> None:
    """Give weights the mode of config.json: safetensors makes files that only their owner may read."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of `folder`. Raises ValueError if it is missing, cannot be read or was changed."""
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {MANIFEST_NAME}: it was never finished") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged") from None
    content = {key: value for key, value in manifest.items() if key != "seal"}
    if manifest.get("seal") != fingerprint(content):
        raise ValueError(f"{path} does not match its own seal: it is damaged")
    return manifest


def damages(folder: Path) -> list[str]:
    """Problems of a folder that should match its manifest, one sentence each; empty if it is undamaged."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    sentences = []
    for name, expected in sorted(manifest["files"].items()):
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                sentences.append(f"{name} has {size} bytes, not {expected['bytes']}")
            elif sha256_file(folder / name) != expected["sha256"]:
                sentences.append(f"{name} does not have the sha256 of its manifest")
        except FileNotFoundError:
            sentences.append(f"{name} is missing")
        except OSError as error:
            sentences.append(f"{name} cannot be read ({error.strerror})")
    return sentences


@contextmanager
def folder_lock(folder: Path, *, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Lock `folder` for this process; the system releases it when the process dies, however it dies.

    If another process holds the lock, raises BlockingIOError with its id and host; with `on_wait`, calls that with them
    and waits. Raises OSError if the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            if on_wait is None:
                raise BlockingIOError(f"{folder} is in use by {owner}; wait for it to end or stop it") from None
            on_wait(owner)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            advice = "mount its file system with flock (Lustre: -o flock) or choose another disk"
            raise OSError(f"{folder} cannot be locked ({error.strerror}): {advice}") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """True if a living process holds `folder`. False without a lock file, or on a file system without locks."""
    try:
        with (folder / LOCK_NAME).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False
