"""prepare(): blocks, facts, reuse, damage and fingerprints; beside other processes, on a full disk and in a log."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from normfree.data import prepare, prepared
from normfree.data.ngram import kneser_ney_perplexity
from normfree.files import damages
from normfree.spec.run import DataSpec
from tests.data.prepare import make, token_ids
from tests.machine import largest_file, wait_for


@pytest.mark.parametrize("packing", ["windows", "concatenate"])
def test_blocks_decode_to_the_text_they_came_from(spec: DataSpec, tmp_path: Path, texts: list[str], packing) -> None:
    corpus = make(replace(spec, packing=packing), tmp_path)
    tokenizer = corpus.tokenizer()
    for split in ("train", "validation"):
        blocks = tokenizer.batch_decode(token_ids(corpus, split))
        pieces = blocks if packing == "windows" else "".join(blocks).split(str(tokenizer.eos_token))
        assert all(any(piece in text for text in texts) for piece in pieces)
        assert token_ids(corpus, split).shape[1] == 16
    assert (tokenizer.eos_token_id in token_ids(corpus, "train")) == (packing == "concatenate")
    facts = corpus.facts()
    assert (facts["train_documents"], facts["validation_documents"]) == (57, 3)
    assert facts["train_tokens"] == token_ids(corpus, "train").size
    json.dumps(facts, allow_nan=False)
    predicted = tokenizer.batch_decode(token_ids(corpus, "validation")[:, 1:], skip_special_tokens=True)
    sizes = [len(text.encode()) for text in predicted]
    assert corpus.validation["predicted_bytes"][:] == sizes
    documents_NT = corpus.held_out_documents()
    assert documents_NT is not None
    ids, numbers = token_ids(corpus, "validation").reshape(-1), documents_NT.reshape(-1)
    for number in range(3):
        assert any(tokenizer.decode(ids[numbers == number], skip_special_tokens=True) in text for text in texts)
    if packing == "concatenate":
        assert (np.flatnonzero(np.diff(numbers)) == np.flatnonzero(ids[:-1] == tokenizer.eos_token_id)).all()
    assert facts["bytes_per_token"] == pytest.approx(sum(sizes) / (15 * len(sizes)))


def test_unigrams_and_ngrams_are_the_yardsticks(spec: DataSpec, tmp_path: Path) -> None:
    corpus = make(spec, tmp_path)
    facts = corpus.facts()
    blocks = [token_ids(corpus, split) for split in ("train", "validation")]
    counts_V = 1 + np.bincount(blocks[0].reshape(-1), minlength=corpus.vocab_size)
    nats = -np.log(counts_V / counts_V.sum())[blocks[1][:, 1:]]
    assert facts["unigram_perplexity"] == pytest.approx(np.exp(nats.mean()))
    assert list(facts["ngram_perplexity"]) == ["2", "5"]
    for order, perplexity in facts["ngram_perplexity"].items():
        assert perplexity == kneser_ney_perplexity(*blocks, vocab_size=corpus.vocab_size, order=int(order))
        assert f"{order}-gram {perplexity:.1f}" in corpus.describe()


def test_a_prepared_corpus_is_reused_and_described(spec: DataSpec, tmp_path: Path) -> None:
    first = make(spec, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = make(replace(spec, expected_fingerprint="other"), tmp_path)
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before
    assert first.fingerprint in second.describe()
    assert "57 documents" in second.describe()
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == [first.folder.name]
    with_saved_tokenizer = replace(spec, tokenizer=str(first.folder), vocab_size=999)
    assert make(with_saved_tokenizer, tmp_path / "other").fingerprint == first.fingerprint
    assert prepared(first.facts(), cache=tmp_path) == first
    assert prepared(first.facts() | {"bytes_per_token": 1.0}, cache=tmp_path) is None
    (first.folder / "train.arrow").write_bytes(b"damaged")
    assert prepared(first.facts(), cache=tmp_path) is None


def test_content_and_spec_decide_and_no_names(spec: DataSpec, tmp_path: Path, text_folder: Path) -> None:
    first = make(spec, tmp_path / "cache")
    moved = text_folder.rename(tmp_path / "moved")
    for number, path in enumerate(sorted(moved.iterdir())):
        path.rename(moved / f"renamed_{60 - number}.py")
    spec = replace(spec, paths=(str(moved),))
    assert make(spec, tmp_path / "cache").folder == first.folder
    assert make(spec, tmp_path / "other").fingerprint == first.fingerprint
    held_out = replace(spec, validation_paths=(str(next(moved.iterdir())),))
    assert make(held_out, tmp_path / "cache").folder != first.folder
    assert make(replace(spec, context=8), tmp_path / "cache").fingerprint != first.fingerprint
    (moved / "renamed_0.py").write_text("class Other:\n    changed = True\n" * 30)
    assert make(spec, tmp_path / "cache").fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 100_000}, r"the validation text \(\d+ bytes\) fills no block of data.context=100000 tokens"),
        ({"vocab_size": 50_000}, r"data.vocab_size=50000: .* has only \d+ pieces"),
        ({"max_bytes": 5}, "the training text has only 260 pieces"),
    ],
)
def test_too_little_text_is_refused(spec: DataSpec, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(replace(spec, **change), tmp_path)
    assert list(tmp_path.glob("corpora/*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_waiting_process_takes_over_from_a_killed_one(tmp_path: Path, caplog, killed: bool) -> None:
    (tmp_path / "long.txt").write_text("".join(f"value_{n} = {n * n % 9973}\n" for n in range(200_000)))
    spec = DataSpec(source="files", paths=(str(tmp_path / "long.txt"),), vocab_size=400, context=16)
    other = multiprocessing.get_context("spawn").Process(target=make, args=(spec, tmp_path))
    other.start()
    assert other.pid is not None
    try:
        wait_for(lambda: list(tmp_path.glob("corpora/.preparing-*")))
        os.kill(other.pid, signal.SIGSTOP)
        assert not list(tmp_path.glob("corpora/*/manifest.json"))
        with ThreadPoolExecutor() as pool, caplog.at_level(logging.INFO, "normfree"):
            waiting = pool.submit(make, spec, tmp_path)
            wait_for(lambda: f"waiting for process {other.pid} on {socket.gethostname()}" in caplog.text)
            os.kill(other.pid, signal.SIGKILL if killed else signal.SIGCONT)
            corpus = waiting.result()
    finally:
        other.kill()
        other.join()
    assert str(corpus.folder) in caplog.text
    assert damages(corpus.folder) == []
    assert ("Tokenizing the text (" in caplog.text) == killed


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


def test_a_full_disk_is_named_and_left_clean(spec: DataSpec, tmp_path: Path) -> None:
    message = rf"no room for the corpus in {tmp_path / 'corpora'} \(.*File too large.*NORMFREE_CACHE"
    with largest_file(5000), pytest.raises(OSError, match=message):
        make(spec, tmp_path)
    assert list((tmp_path / "corpora").iterdir()) == []
    assert damages(make(spec, tmp_path).folder) == []


@pytest.mark.parametrize("progress", [True, False])
def test_a_log_shows_progress_only_if_asked(spec, tmp_path: Path, capsys, monkeypatch, progress: bool) -> None:
    prepare(spec, cache=tmp_path / "first", progress=progress)
    assert capsys.readouterr().err == ""  # it took less than a minute
    monkeypatch.setattr("normfree.data.corpus.LOG_SECONDS", 0.0)
    prepare(spec, cache=tmp_path / "second", progress=progress)
    assert ("encoding train text: " in capsys.readouterr().err) == progress
