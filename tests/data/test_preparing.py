"""prepare() beside other processes, on a full disk and in a log: who waits, what is left, what is said."""

from __future__ import annotations

import errno
import fcntl
import logging
import logging.handlers
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from normfree.data import Corpus, prepare
from normfree.files import damages
from normfree.spec.run import DataSpec


def make(spec: DataSpec, cache: Path) -> Corpus:
    return prepare(spec, cache=cache, progress=False)


def make_and_tell(spec: DataSpec, cache: Path) -> tuple[Corpus, list[str]]:
    """The corpus, and what was logged on the way."""
    told = logging.handlers.BufferingHandler(capacity=10_000)
    logger = logging.getLogger("normfree")
    logger.addHandler(told)
    logger.setLevel(logging.INFO)
    return make(spec, cache), [record.getMessage() for record in told.buffer]


def encoded(lines: list[str]) -> bool:
    return any(line.startswith("encoding with tiktoken") for line in lines)


@pytest.mark.slow
def test_of_two_processes_preparing_at_once_one_encodes_and_both_end_with_a_sound_corpus(
    spec: DataSpec, tmp_path: Path
) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        (first, lines), (second, other_lines) = pool.starmap(make_and_tell, [(spec, tmp_path)] * 2)
    assert first == second
    assert damages(first.folder) == []
    assert encoded(lines) != encoded(other_lines)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_who_waits_for_a_preparer_says_so_and_takes_over_from_a_killed_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, killed: bool
) -> None:
    (tmp_path / "long.txt").write_text("".join(f"value_{n} = {n * n % 9973}\n" for n in range(200_000)))
    spec = DataSpec(source="files", paths=(str(tmp_path / "long.txt"),), vocab_size=400, context=16)
    other = multiprocessing.get_context("spawn").Process(target=make, args=(spec, tmp_path))
    other.start()
    assert other.pid is not None
    try:
        wait_until(lambda: list(tmp_path.glob("corpora/.preparing-*/.lock")))
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
    assert encoded(caplog.messages) == killed


def wait_until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_without_locks_a_corpus_is_not_prepared_and_one_that_is_there_is_used(
    spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make(spec, tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert make(spec, tmp_path) == corpus
    with pytest.raises(OSError, match=r"cannot be locked \(No locks available\): its file system has no flock; mount"):
        make(replace(spec, context=8), tmp_path)


def leave_scratch(corpora: Path, name: str, *, age_seconds: float) -> Path:
    """What a process that writes no more, or whose lock is not seen, has in `corpora`."""
    scratch = corpora / f".preparing-{name}"
    (scratch / "corpus").mkdir(parents=True)
    (scratch / "corpus" / "train.arrow").write_bytes(b"half")
    (scratch / ".lock").write_text("process 1 on elsewhere")
    for path in (*scratch.rglob("*"), scratch):
        os.utime(path, (time.time() - age_seconds,) * 2)
    return scratch


def test_what_a_killed_preparation_left_is_removed_and_a_running_one_stays(spec: DataSpec, tmp_path: Path) -> None:
    corpora, hour = tmp_path / "corpora", 3600
    leave_scratch(corpora, "dead", age_seconds=25 * hour)
    begins = leave_scratch(corpora, "begins", age_seconds=hour)
    writes = leave_scratch(corpora, "writes", age_seconds=25 * hour)
    os.utime(writes / "corpus" / "train.arrow")
    alive = leave_scratch(corpora, "alive", age_seconds=25 * hour)
    with (alive / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        corpus = make(spec, tmp_path)
    assert sorted(corpora.iterdir()) == sorted([begins, writes, alive, corpus.folder])


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system then answers EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_corpus_that_may_not_grow_says_where_and_is_prepared_afterwards(spec: DataSpec, tmp_path: Path) -> None:
    with largest_file(5000), pytest.raises(OSError, match=r"File too large.* GB are free .*NORMFREE_CACHE") as caught:
        make(spec, tmp_path)
    assert f"no room for the corpus in {tmp_path / 'corpora'} " in str(caught.value)
    assert list((tmp_path / "corpora").iterdir()) == []
    assert damages(make(spec, tmp_path).folder) == []


def test_a_data_set_that_may_not_grow_says_why_and_where_and_is_prepared_afterwards(
    hub_folder: Path, tmp_path: Path
) -> None:
    spec = DataSpec(source="hub", dataset=str(hub_folder), vocab_size=300, context=16)
    refused = pytest.raises(ValueError, match=r"cannot be prepared \(OSError: \[Errno 27\] File too large\)")
    with largest_file(5000), refused as caught:
        make(spec, tmp_path)
    place, free = re.findall(r"kept in (\S+), where (\S+) GB are free .* HF_HOME", str(caught.value))[0]
    assert place == str(tmp_path / "hub-cache")
    assert float(free) == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, abs=1, rel=0.05)
    assert "\n" not in str(caught.value)
    assert make(spec, tmp_path).facts()["train_documents"] == 50


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError("Not enough disk space. Needed: 7 GiB"),
        RuntimeError("Data processing error:\nDisk quota exceeded"),
    ],
)
def test_a_download_that_finds_no_room_is_not_called_a_hub_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"cannot be prepared \(.*(quota exceeded|Needed: 7 GiB)\); it is kept in"):
        make(DataSpec(source="hub", dataset="some/name"), tmp_path)


def test_a_log_has_lines_of_how_far_a_preparation_is_and_one_before_a_download(
    hub_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normfree.data.progress.A_MINUTE", 0.0)
    spec = DataSpec(source="hub", dataset=str(hub_folder), vocab_size=300, context=16, train_documents=30)
    with caplog.at_level(logging.INFO, "normfree"):
        corpus = prepare(spec, cache=tmp_path)
    size = corpus.facts()["train_bytes"] / 1e6
    for task in ("training the tokenizer", "encoding train text"):
        lines = [line for line in caplog.messages if line.startswith(f"{task}: ")]
        assert len(lines) == 30
        assert lines[-1] == f"{task}: 30 of at most 30 documents, {size:.1f} MB after 0 min"
    before = [line for line in caplog.messages if line.startswith(f"loading data set {hub_folder}, split train: ")]
    assert len(before) == 1
    assert f"what {tmp_path / 'hub-cache'} lacks is downloaded" in before[0]
    assert caplog.messages.index(before[0]) < caplog.messages.index(lines[0])


def test_no_line_comes_within_a_minute_nor_without_progress(
    spec: DataSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "normfree"):
        prepare(spec, cache=tmp_path / "one")
        monkeypatch.setattr("normfree.data.progress.A_MINUTE", 0.0)
        make(spec, tmp_path / "other")
    assert "documents" not in caplog.text
