"""prepare() beside other processes, on a full disk and in a log."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from normfree.data import prepare
from normfree.files import damages
from normfree.spec.run import DataSpec
from tests.data.prepare import make


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_waiting_process_takes_over_from_a_killed_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, killed: bool
) -> None:
    (tmp_path / "long.txt").write_text("".join(f"value_{n} = {n * n % 9973}\n" for n in range(200_000)))
    spec = DataSpec(source="files", paths=(str(tmp_path / "long.txt"),), vocab_size=400, context=16)
    other = multiprocessing.get_context("spawn").Process(target=make, args=(spec, tmp_path))
    other.start()
    assert other.pid is not None
    try:
        wait_until(lambda: list(tmp_path.glob("corpora/.preparing-*")))
        os.kill(other.pid, signal.SIGSTOP)
        assert not list(tmp_path.glob("corpora/*/manifest.json"))
        with ThreadPoolExecutor() as pool, caplog.at_level(logging.INFO, "normfree"):
            waiting = pool.submit(make, spec, tmp_path)
            wait_until(lambda: f"waiting for process {other.pid} on {socket.gethostname()}" in caplog.text)
            os.kill(other.pid, signal.SIGKILL if killed else signal.SIGCONT)
            corpus = waiting.result()
    finally:
        other.kill()
        other.join()
    assert str(corpus.folder) in caplog.text
    assert damages(corpus.folder) == []
    assert ("Tokenizing the text (" in caplog.text) == killed


def wait_until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_disk_without_locks_is_read_only(spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make(spec, tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert make(spec, tmp_path) == corpus
    with pytest.raises(OSError, match=r"cannot be locked \(No locks available\): mount its file system with flock"):
        make(replace(spec, context=8), tmp_path)


def test_scratch_of_a_killed_preparation_is_removed(spec: DataSpec, tmp_path: Path) -> None:
    corpus = make(spec, tmp_path)
    scratch = corpus.folder.with_name(f".preparing-{corpus.folder.name}-{socket.gethostname()}")
    corpus.folder.rename(scratch)
    (scratch / "half.arrow").write_bytes(b"half")
    assert make(spec, tmp_path) == corpus
    assert list((tmp_path / "corpora").iterdir()) == [corpus.folder]
    assert damages(corpus.folder) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: the system then returns EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_named_and_left_clean(spec: DataSpec, tmp_path: Path) -> None:
    message = rf"no room for the corpus in {tmp_path / 'corpora'} \(.*File too large.*NORMFREE_CACHE"
    with largest_file(5000), pytest.raises(OSError, match=message):
        make(spec, tmp_path)
    assert list((tmp_path / "corpora").iterdir()) == []
    assert damages(make(spec, tmp_path).folder) == []


@pytest.mark.parametrize("progress", [True, False])
def test_a_log_shows_progress_only_if_asked(
    spec: DataSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch, progress: bool
) -> None:
    prepare(spec, cache=tmp_path / "first", progress=progress)
    assert capsys.readouterr().err == ""  # it took less than a minute
    monkeypatch.setattr("normfree.data.corpus.LOG_SECONDS", 0.0)
    prepare(spec, cache=tmp_path / "second", progress=progress)
    assert ("encoding train text: " in capsys.readouterr().err) == progress
