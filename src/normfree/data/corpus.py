"""Prepare a corpus once: text to a folder of packed blocks with a manifest, reused while it is sound.

A corpus folder lies at `cache/corpora/<key>` and holds tokenizer files, train.arrow, validation.arrow
and manifest.json. The key is made of the spec and the versions of the sources; the fingerprint of the
content (token ids and tokenizer), so it is equal wherever the same text met the same tokenizer.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from normfree.data.fast import FastEncoder, NotReproducibleError
from normfree.data.installed import InstalledSource
from normfree.data.packing import BlockWriter, concatenated, unigram_perplexity, windows
from normfree.data.progress import TextProgress
from normfree.data.scratch import NO_ROOM, free_room, scratch_folder
from normfree.data.sources import FilesSource, HubSource, Source, Split, limited
from normfree.data.tokenizer import Encoder, load_tokenizer, tokenizer_hash, train_tokenizer, vocabulary_size
from normfree.files import (
    MANIFEST_NAME,
    damages,
    describe_files,
    fingerprint,
    folder_lock,
    read_manifest,
    write_manifest,
)
from normfree.spec.run import DataSpec

FORMAT = 1
SOURCES = {"installed": InstalledSource, "codeparrot": HubSource, "hub": HubSource, "files": FilesSource}
CHUNK_CHARACTERS = 4_000_000
"""Text that is encoded together: large enough for all cores, small enough for any memory."""

TOKENIZER_TASK = "training the tokenizer"
_HELD_OUT_TOO = " (duplicates are those of held-out text too)"

log = logging.getLogger("normfree")


def default_cache() -> Path:
    """Where corpora lie: the environment variable NORMFREE_CACHE, else ~/.cache/normfree."""
    try:
        return Path(os.environ.get("NORMFREE_CACHE") or Path.home() / ".cache" / "normfree")
    except RuntimeError:
        raise ValueError("there is no home folder to keep corpora in: set NORMFREE_CACHE or cache_dir=FOLDER") from None


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 over token ids, tokenizer and context: equal on every machine with the same inputs."""
        return self.manifest["corpus"]["fingerprint"]

    @property
    def vocab_size(self) -> int:
        """Number of token ids, end token included."""
        return self.manifest["corpus"]["vocab_size"]

    @cached_property
    def train(self) -> Dataset:
        """Training blocks, column `input_ids` of exactly T tokens, mapped from disk."""
        return Dataset.from_file(str(self.folder / "train.arrow"))

    @cached_property
    def validation(self) -> Dataset:
        """Held-out blocks, with the column `predicted_bytes`: UTF-8 bytes of the text of tokens 2..T."""
        return Dataset.from_file(str(self.folder / "validation.arrow"))

    def held_out_ids(self) -> np.ndarray:
        """(N, T) int64 token ids of the held-out blocks, read into memory."""
        return np.stack(self.validation.with_format("numpy")["input_ids"][:]).astype(np.int64)

    def predicted_bytes(self) -> int:
        """UTF-8 bytes of all tokens that held-out blocks predict."""
        return int(np.sum(self.validation["predicted_bytes"]))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer behind the blocks."""
        return PreTrainedTokenizerFast.from_pretrained(self.folder)

    def facts(self) -> dict[str, Any]:
        """What run.json says of the corpus: plain JSON values."""
        return dict(self.manifest["corpus"])

    def left_out(self, split: Split) -> str:
        """How many documents are not in the corpus, and why."""
        return _counts(self.manifest["corpus"]["dropped"][split])

    def describe(self) -> str:
        """The corpus in readable lines."""
        facts = self.facts()
        lines = [
            f"corpus       {self.folder}",
            f"fingerprint  {facts['fingerprint']}",
            f"source       {facts['source']}, packing {facts['packing']}, T = {facts['context']}",
            f"tokenizer    {facts['vocab_size']:,} pieces, {facts['bytes_per_token']:.2f} bytes a token",
        ]
        splits: tuple[Split, ...] = ("train", "validation")
        for split in splits:
            units = ("documents", "bytes", "blocks", "tokens")
            documents, size, blocks, tokens = (facts[f"{split}_{unit}"] for unit in units)
            text = f"{documents:,} documents, {size / 1e6:.2f} MB, {blocks:,} blocks, {tokens:,} tokens"
            lines += [f"{split:<12} {text}", f"  left out   {self.left_out(split)}"]
        lines.append(f"to beat      unigram perplexity {facts['unigram_perplexity']:.1f}")
        return "\n".join(lines)


def prepare(spec: DataSpec, *, cache: Path | None = None, progress: bool = True) -> Corpus:
    """The corpus of `spec`, from the cache or prepared now.

    Every file is checked against its sha256 before reuse; a damaged corpus is prepared again, with a warning. Of
    several processes one prepares, and the others wait for it.

    Raises ValueError for a source that cannot be read or gives too little text; OSError for a disk that is full or has
    no locks.
    """
    source: Source = SOURCES[spec.source](spec)
    cache = cache or default_cache()
    folder = cache / "corpora" / corpus_key(spec, source)
    if folder.exists() and not damages(folder):
        return Corpus(folder, read_manifest(folder))

    said = "waiting for %s, which prepares the same corpus, %s"
    with folder_lock(cache / "locks" / folder.name, on_wait=lambda owner: log.info(said, owner, folder)):
        if folder.exists():
            if not (problems := damages(folder)):
                return Corpus(folder, read_manifest(folder))  # prepared by another process meanwhile
            log.warning("corpus %s is damaged and prepared again: %s", folder, "; ".join(problems))
        _make(spec, source, folder, progress)
    return Corpus(folder, read_manifest(folder))


def _make(spec: DataSpec, source: Source, folder: Path, progress: bool) -> None:
    with scratch_folder(folder.parent) as scratch:
        built = scratch / "corpus"
        built.mkdir()
        try:
            facts = _Preparation(spec, source, built, progress).run()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise OSError(
                f"no room for the corpus in {folder.parent} ({error}), where {free_room(folder.parent)}; "
                "cache_dir=FOLDER or NORMFREE_CACHE choose another place"
            ) from None
        write_manifest(built, {"format": FORMAT, "corpus": facts})
        _install(built, folder)


def prepared(recorded: Mapping[str, Any], *, cache: Path | None = None) -> Corpus | None:
    """A sound corpus of the cache that has the recorded fingerprint and bytes, wherever its text came from and whether
    or not it is there."""
    for manifest in sorted(((cache or default_cache()) / "corpora").glob(f"*/{MANIFEST_NAME}")):
        with suppress(ValueError, KeyError, OSError):
            found = read_manifest(manifest.parent)
            same = all(found["corpus"][key] == recorded[key] for key in ("fingerprint", "bytes_per_token"))
            if same and not damages(manifest.parent):
                return Corpus(manifest.parent, found)
    return None


def corpus_key(spec: DataSpec, source: Source) -> str:
    """Name of the folder that may be reused: one for each spec and each version of its inputs."""
    fields = asdict(spec)
    del fields["expected_fingerprint"]
    if spec.source == "files":  # `versions` says what the files hold, wherever they lie
        fields |= {"paths": (), "validation_paths": bool(spec.validation_paths)}
    place = Path(spec.tokenizer) if spec.tokenizer else None
    tokenizer = describe_files(place) if place and place.is_dir() else spec.tokenizer
    counted = ["added words have bytes"] if spec.tokenizer else []  # they had none in older corpora
    return fingerprint([FORMAT, fields, source.versions, tokenizer, version("tokenizers"), *counted])


def _install(built: Path, folder: Path) -> None:
    """Move a finished corpus to its place; a sound one that another process put there first stays."""
    if folder.exists() and damages(folder):
        folder.rename(built.with_name("damaged"))
    try:
        built.rename(folder)
    except OSError:
        if damages(folder):
            raise


class _Preparation:
    """One pass from documents to blocks, in `folder`."""

    def __init__(self, spec: DataSpec, source: Source, folder: Path, progress: bool) -> None:
        self.spec = spec
        self.source = source
        self.folder = folder
        self.progress = progress
        self.kept = {"train": Counter(), "validation": Counter()}
        self.dropped: dict[str, Counter[str]] = {"train": Counter(), "validation": Counter()}

    def run(self) -> dict[str, Any]:
        """Write tokenizer and blocks; returns the facts of the corpus."""
        tokenizer = self._tokenizer()
        written = self._write_splits(tokenizer)
        tokenizer.save_pretrained(self.folder)
        train, validation = written["train"], written["validation"]
        sha256 = tokenizer_hash(tokenizer)
        content = [FORMAT, sha256, self.spec.context, train.content_hash, validation.content_hash]
        predicted_tokens = int(validation.predicted_counts_V.sum())
        facts: dict[str, Any] = {
            "fingerprint": fingerprint(content),
            "source": self.spec.source,
            "context": self.spec.context,
            "packing": self.spec.packing,
            "vocab_size": vocabulary_size(tokenizer),
            "tokenizer_sha256": sha256,
            "bytes_per_token": validation.predicted_bytes / predicted_tokens,
            "unigram_perplexity": unigram_perplexity(train.counts_V, validation.predicted_counts_V),
            "dropped": {split: dict(sorted(counts.items())) for split, counts in self.dropped.items()},
            "versions": self.source.versions,
        }
        if isinstance(self.source, HubSource):
            facts["revisions"] = self.source.revisions
        for split, writer in written.items():
            facts[f"{split}_blocks"] = writer.blocks
            facts[f"{split}_tokens"] = writer.blocks * self.spec.context
            facts[f"{split}_documents"] = self.kept[split]["documents"]
            facts[f"{split}_bytes"] = self.kept[split]["bytes"]
        return facts

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        if self.spec.tokenizer:
            tokenizer = load_tokenizer(self.spec.tokenizer)
        else:
            tokenizer = train_tokenizer(self._documents("train", TOKENIZER_TASK), self.spec.vocab_size)
        if self.spec.packing == "concatenate" and tokenizer.eos_token_id is None:
            raise ValueError(
                "data.packing=concatenate puts an end token between documents, and "
                f"data.tokenizer={self.spec.tokenizer!r} has none; use data.packing=windows"
            )
        return tokenizer

    def _documents(self, split: Split, task: str) -> Iterator[str]:
        """The documents of a split within the limits of the spec, counted and shown."""
        self.kept[split].clear()
        self.dropped[split].clear()
        most = {"train": self.spec.train_documents, "validation": self.spec.validation_documents}[split]
        most_bytes = self.spec.max_bytes if split == "train" else None
        documents, beyond = self.source.documents(split, self.dropped[split]), Counter[str]()
        with TextProgress(task, shown=self.progress, most_documents=most) as progress:
            for document in limited(documents, most_documents=most, most_bytes=most_bytes, beyond=beyond):
                size = len(document.encode())
                self.kept[split].update(documents=1, bytes=size)
                progress.update(size)
                yield document
        for limit in beyond if task != TOKENIZER_TASK else ():  # once is enough
            by_rows = self.source if isinstance(self.source, HubSource) else None  # can be many: counted, not read
            beyond[limit] += by_rows.rows_left if by_rows else sum(1 for _ in documents)
        self.dropped[split].update(beyond)
        if not self.kept[split]["documents"]:
            raise ValueError(
                f"data={self.spec.source} gives no {split} text ({self._given()}); left out: "
                f"{_counts(self.dropped[split])}{_HELD_OUT_TOO if self.dropped['train']['duplicate'] else ''}"
            )

    def _write_splits(self, tokenizer: PreTrainedTokenizerFast) -> dict[Split, BlockWriter]:
        """Both splits with tiktoken if its ids are those of tokenizers, else both again with tokenizers."""
        splits: tuple[Split, ...] = ("validation", "train")
        try:
            encoder = FastEncoder(tokenizer)
            return {split: self._write(split, tokenizer, encoder) for split in splits}
        except NotReproducibleError as reason:
            log.warning("the text is encoded with tokenizers, several times slower than with tiktoken: %s", reason)
        return {split: self._write(split, tokenizer, Encoder(tokenizer)) for split in splits}

    def _write(self, split: Split, tokenizer: PreTrainedTokenizerFast, encoder: Encoder | FastEncoder) -> BlockWriter:
        encode = encoder.encode if split == "train" else encoder.encode_with_bytes
        texts = self._documents(split, f"encoding {split} text")
        documents = (document_SC for chunk in in_chunks(texts) for document_SC in encode(chunk))
        if self.spec.packing == "windows":
            blocks = windows(documents, self.spec.context)
        else:
            blocks = concatenated(documents, self.spec.context, end=cast(int, tokenizer.eos_token_id))
        writer = BlockWriter(self.folder / f"{split}.arrow", vocab_size=vocabulary_size(tokenizer))
        writer.write_all(blocks)
        if not writer.blocks:
            kept = self.kept[split]
            raise ValueError(
                f"the {split} text ({kept['documents']} documents, {kept['bytes']} bytes) fills no block of "
                f"data.context={self.spec.context} tokens; give more text or a shorter "
                f"context ({self._given()})"
            )
        return writer

    def _given(self) -> str:
        """The settings that decide how much text there is, for messages."""
        names = ("paths", "validation_paths", "dataset", "max_bytes", "train_documents", "validation_documents")
        return ", ".join(f"data.{name}={value}" for name in names if (value := getattr(self.spec, name)))


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "nothing"


def in_chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about `CHUNK_CHARACTERS` characters."""
    chunk, filled = [], 0
    for text in texts:
        chunk.append(text)
        filled += len(text)
        if filled >= CHUNK_CHARACTERS:
            yield chunk
            chunk, filled = [], 0
    if chunk:
        yield chunk
