"""Prepare a corpus once: text or images become a folder of rows with a manifest, reused while it is undamaged.

A corpus folder lies at `cache/corpora/<key>` and holds tokenizer files, train.arrow, validation.arrow and
manifest.json. The key is made of the spec and the versions of the sources; the fingerprint is made of the content
(token ids and tokenizer), so it is equal wherever the same text meets the same tokenizer.
"""

import errno
import logging
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoImageProcessor, PreTrainedTokenizerFast

from normfree.data.docstrings import paired, sources_and_targets, target_ids, target_tokens
from normfree.data.images import IMAGE_SOURCES, ImageSource, write_images
from normfree.data.installed import InstalledSource
from normfree.data.ngram import ORDERS, kneser_ney_perplexity
from normfree.data.packing import BlockWriter, concatenated, in_groups, unigram_perplexity, windows
from normfree.data.sources import FilesSource, HubSource, Source, Split, limited
from normfree.data.tiktoken_encoder import FastEncoder, NotReproducibleError
from normfree.data.tokenizer import Encoder, load_tokenizer, tokenizer_hash, train_tokenizer, vocabulary_size
from normfree.files import (
    damages,
    default_cache,
    describe_files,
    fingerprint,
    folder_lock,
    read_manifest,
    write_manifest,
)
from normfree.spec.families import FAMILIES
from normfree.spec.run import DataSpec

FORMAT = 1
SOURCES = {"installed": InstalledSource, "codeparrot": HubSource, "hub": HubSource, "files": FilesSource}
SOURCES |= IMAGE_SOURCES
SPLITS: tuple[Split, ...] = ("train", "validation")
CHUNK_CHARACTERS = 4_000_000  # encoded together: large enough for all cores, small enough for any memory
LOG_SECONDS = 60.0  # between lines of progress where standard error is not a terminal

log = logging.getLogger("normfree")


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
        """Held-out blocks, with the columns of `BlockWriter`."""
        return Dataset.from_file(str(self.folder / "validation.arrow"))

    def held_out_ids(self) -> np.ndarray:
        """(N, T) int64 token ids of the held-out blocks, read into memory."""
        return _read_blocks(self.validation)

    def predicted_bytes(self) -> np.ndarray:
        """(N,) UTF-8 bytes of the tokens that each held-out block asks a model to predict."""
        return np.array(self.validation["predicted_bytes"])

    def held_out_documents(self) -> np.ndarray | None:
        """(N, T) the number of each held-out token's document; None for docstrings and images."""
        if "document" not in self.validation.column_names:
            return None
        return np.stack(self.validation.with_format("numpy")["document"][:])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer behind the blocks."""
        return PreTrainedTokenizerFast.from_pretrained(self.folder)

    def processor(self) -> Any:
        """The tokenizer, which a saved model needs beside it."""
        return self.tokenizer()

    def facts(self) -> dict[str, Any]:
        """What run.json records of the corpus: plain JSON values."""
        return dict(self.manifest["corpus"])

    def left_out(self, split: Split) -> str:
        """How many documents of a split are not in the corpus, and why."""
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
        for split in SPLITS:
            sizes = ", ".join(f"{facts[f'{split}_{unit}']:,} {unit}" for unit in ("documents", "blocks", "tokens"))
            lines.append(f"{split:<12} {sizes}, {facts[f'{split}_bytes'] / 1e6:.2f} MB")
            lines.append(f"  left out   {self.left_out(split)}")
        lines.append(f"to beat      unigram perplexity {facts['unigram_perplexity']:.1f}")
        ngrams = facts.get("ngram_perplexity", {}).items()
        return "\n".join(lines) + "".join(f", {order}-gram {value:.1f}" for order, value in ngrams)


class ImageCorpus(Corpus):
    """A prepared corpus of images with classes: the column `input_ids` holds rows of bytes (data/images.py)."""

    def held_out_ids(self) -> np.ndarray:
        """(N, B) bytes of the held-out images and their classes."""
        return np.stack(self.validation.with_format("numpy")["input_ids"][:]).astype(np.uint8)

    def predicted_bytes(self) -> np.ndarray:
        """(N,) zeros: classes have no bytes."""
        return np.zeros(len(self.validation), dtype=np.int64)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Raises ValueError: images have none."""
        raise ValueError("images have no tokenizer: leave this measure out")

    def processor(self) -> Any:
        """The image processor, which makes of a file what a model is trained on."""
        return AutoImageProcessor.from_pretrained(self.folder)

    def describe(self) -> str:
        facts = self.facts()
        left_out = "; of held-out images: ".join(map(self.left_out, SPLITS))
        lines = [f"corpus       {self.folder}", FAMILIES["vision"].corpus.format(**facts), f"left out: {left_out}"]
        return "\n".join([*lines, f"to beat      accuracy {facts['majority_accuracy']:.3f}, of one class for all"])


def _opened(folder: Path, manifest: dict[str, Any]) -> Corpus:
    return (ImageCorpus if manifest["corpus"]["source"] in IMAGE_SOURCES else Corpus)(folder, manifest)


def prepare(spec: DataSpec, *, cache: Path | None = None, progress: bool = True) -> Corpus:
    """Load the corpus of `spec` from the cache, or prepare it.

    Every file is checked against its sha256 before reuse; a damaged corpus is prepared again, with a warning. Of
    several processes one prepares the corpus, and the others wait for it. Raises ValueError for a source that cannot be
    read or gives too little text; OSError for a disk that is full or has no locks.
    """
    source: Source | ImageSource = SOURCES[spec.source](spec)
    cache = cache or default_cache()
    folder = cache / "corpora" / corpus_key(spec, source)
    message = "waiting for %s, which prepares the same corpus, %s"
    if corpus := _undamaged(folder):
        return corpus
    with folder_lock(cache / "locks" / folder.name, on_wait=lambda owner: log.info(message, owner, folder)):
        if corpus := _undamaged(folder):  # another process prepared it meanwhile
            return corpus
        if folder.exists():
            log.warning("corpus %s is damaged and prepared again: %s", folder, "; ".join(damages(folder)))
            shutil.rmtree(folder)
        _make(spec, source, folder, progress)
    return _opened(folder, read_manifest(folder))


def _undamaged(folder: Path) -> Corpus | None:
    return _opened(folder, read_manifest(folder)) if folder.exists() and not damages(folder) else None


def _make(spec: DataSpec, source: Source | ImageSource, folder: Path, progress: bool) -> None:
    """Prepare a corpus in a scratch folder and move it to its place."""
    # Some clusters show locks on their own node only, so each machine has a scratch folder of its own.
    scratch = folder.with_name(f".preparing-{folder.name}-{socket.gethostname()}")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
    scratch.mkdir(parents=True)
    try:
        if isinstance(source, ImageSource):
            facts = write_images(spec, source, scratch)
        else:
            facts = _Preparation(spec, source, scratch, quiet=not progress).run()
        write_manifest(scratch, {"format": FORMAT, "corpus": facts})
        scratch.rename(folder)
    except OSError as error:
        if _undamaged(folder):
            return  # a machine whose lock is not visible here was faster
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        advice = "set cache_dir=FOLDER or NORMFREE_CACHE to a folder on a larger disk"
        raise OSError(f"no room for the corpus in {folder.parent} ({error}): {advice}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def prepared(recorded: Mapping[str, Any], *, cache: Path | None = None) -> Corpus | None:
    """Find the undamaged cached corpus with the recorded fingerprint and bytes, even if its text is gone or moved."""
    for folder in sorted(((cache or default_cache()) / "corpora").glob("[!.]*")):
        with suppress(ValueError, KeyError):
            manifest = read_manifest(folder)
            same = all(manifest["corpus"].get(key) == recorded.get(key) for key in ("fingerprint", "bytes_per_token"))
            if same and not damages(folder):
                return _opened(folder, manifest)
    return None


def corpus_key(spec: DataSpec, source: Source | ImageSource) -> str:
    """Name of a corpus's folder: one for each spec and each version of its inputs."""
    fields = asdict(spec)
    del fields["expected_fingerprint"]
    if spec.source in ("files", *IMAGE_SOURCES):  # `versions` describes the content of the files, wherever they lie
        fields |= {"paths": (), "validation_paths": bool(spec.validation_paths)}
    if spec.source in IMAGE_SOURCES:
        fields["context"] = None  # it belongs to the model
    place = Path(spec.tokenizer) if spec.tokenizer else None
    tokenizer = describe_files(place) if place and place.is_dir() else spec.tokenizer
    counted = ["added words have bytes"] if spec.tokenizer else []  # they had none in older corpora
    return fingerprint([FORMAT, fields, source.versions, tokenizer, version("tokenizers"), *counted])


class _Preparation:
    """One pass from documents to blocks, in `folder`."""

    def __init__(self, spec: DataSpec, source: Source, folder: Path, *, quiet: bool) -> None:
        self.spec, self.source, self.folder, self.quiet = spec, source, folder, quiet
        self.read: dict[Split, Counter[str]] = {}  # documents and bytes
        self.dropped: dict[Split, Counter[str]] = {}  # documents left out, by reason
        self.has_targets = spec.packing == "docstring"
        self.functions: set[bytes] = set()  # hashes of those that are in the corpus

    def run(self) -> dict[str, Any]:
        """Write tokenizer and blocks; returns the facts of the corpus."""
        tokenizer = self._tokenizer()
        writers = self._write_splits(tokenizer)
        tokenizer.save_pretrained(self.folder)
        train, validation = writers["train"], writers["validation"]
        sha256, vocab_size = tokenizer_hash(tokenizer), vocabulary_size(tokenizer)
        hashes = [sha256, self.spec.context, train.content_hash, validation.content_hash]
        facts: dict[str, Any] = {
            "fingerprint": fingerprint([FORMAT, *hashes]),
            "source": self.spec.source,
            "context": self.spec.context,
            "packing": self.spec.packing,
            "vocab_size": vocab_size,
            "tokenizer_sha256": sha256,
            "bytes_per_token": validation.predicted_bytes / int(validation.predicted_counts_V.sum()),
            "unigram_perplexity": unigram_perplexity(train.counts_V, validation.predicted_counts_V),
            "dropped": {split: dict(sorted(self.dropped[split].items())) for split in SPLITS},
            "versions": self.source.versions,
            "ngram_perplexity": {} if self.has_targets else self._ngram_perplexities(train.blocks, vocab_size),
        }
        if self.has_targets:
            facts["target_tokens"] = target_tokens(self.spec.context)
            facts |= {f"{split}_target_tokens": int(writer.counts_V.sum()) for split, writer in writers.items()}
        if isinstance(self.source, HubSource):
            facts["revisions"] = self.source.revisions
        for split, writer in writers.items():
            facts[f"{split}_blocks"] = writer.blocks
            facts[f"{split}_tokens"] = writer.blocks * self.spec.context
            facts[f"{split}_documents"] = self.read[split]["documents"]
            facts[f"{split}_bytes"] = self.read[split]["bytes"]
        return facts

    def _ngram_perplexities(self, train_blocks: int, vocab_size: int) -> dict[str, float]:
        """Perplexity by order, of the orders that the training text is small enough for: `{"2": 92.4, "5": 49.5}`."""
        orders = [order for order, most_tokens in ORDERS.items() if train_blocks * self.spec.context <= most_tokens]
        files = [str(self.folder / f"{split}.arrow") for split in SPLITS] if orders else []
        blocks = [_read_blocks(Dataset.from_file(file)) for file in files]
        return {str(order): kneser_ney_perplexity(*blocks, vocab_size=vocab_size, order=order) for order in orders}

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        if self.spec.tokenizer:
            tokenizer = load_tokenizer(self.spec.tokenizer)
        else:
            tokenizer = train_tokenizer(self._documents("train", "training the tokenizer"), self.spec.vocab_size)
        if self.spec.packing != "windows" and tokenizer.eos_token_id is None:
            problem = f"needs an end token, and data.tokenizer={self.spec.tokenizer!r} has none"
            raise ValueError(f"data.packing={self.spec.packing} {problem}; use another, or data.packing=windows")
        return tokenizer

    def _documents(self, split: Split, task: str) -> Iterator[str]:
        """Yield the documents of a split within the limits of the spec; count and show them."""
        read = self.read[split] = Counter()
        dropped = self.dropped[split] = Counter()
        most = getattr(self.spec, f"{split}_documents")
        most_bytes = self.spec.max_bytes if split == "train" else None
        documents = self.source.documents(split, dropped)
        pause = 0.1 if sys.stderr.isatty() else LOG_SECONDS
        with tqdm(desc=task, unit="B", unit_scale=True, delay=pause, mininterval=pause, disable=self.quiet) as bar:
            for document in limited(documents, most_documents=most, most_bytes=most_bytes, dropped=dropped):
                size = len(document.encode())
                read.update(documents=1, bytes=size)
                bar.update(size)
                yield document
        if not read["documents"]:
            raise ValueError(f"data={self.spec.source} gives no {split} text; left out: {_counts(dropped)}")

    def _write_splits(self, tokenizer: PreTrainedTokenizerFast) -> dict[Split, BlockWriter]:
        """Write both splits with tiktoken if its ids are those of tokenizers, else with tokenizers."""
        try:
            encoder = FastEncoder(tokenizer)
            return {split: self._write(split, tokenizer, encoder) for split in reversed(SPLITS)}
        except NotReproducibleError as reason:
            log.warning("the text is encoded with tokenizers, several times slower than with tiktoken: %s", reason)
        return {split: self._write(split, tokenizer, Encoder(tokenizer)) for split in reversed(SPLITS)}

    def _write(self, split: Split, tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> BlockWriter:
        encode = encoder.encode if split == "train" else encoder.encode_with_bytes
        texts, not_python = self._documents(split, f"encoding {split} text"), Counter()
        if self.has_targets:
            if split == "validation":  # the first to be written
                self.functions.clear()
            texts = sources_and_targets(texts, not_python, self.functions)
        documents = (document_SC for part in in_groups(texts, CHUNK_CHARACTERS) for document_SC in encode(part))
        if split == "validation" and not self.has_targets:
            documents = (np.insert(document_SC, 2, number, axis=1) for number, document_SC in enumerate(documents))
        context, end = self.spec.context, cast(int, tokenizer.eos_token_id)
        with_ends = partial(paired if self.has_targets else concatenated, end=end)
        blocks = (windows if self.spec.packing == "windows" else with_ends)(documents, context)
        targets = partial(target_ids, end=end) if self.has_targets else None
        writer = BlockWriter(self.folder / f"{split}.arrow", vocab_size=vocabulary_size(tokenizer), targets=targets)
        writer.write_all(blocks)
        self.dropped[split].update(not_python)
        if not writer.blocks:
            lack = f"fills no block of data.context={context} tokens (packing {self.spec.packing})"
            lack = "has no function with a docstring" if self.has_targets else lack
            text, dropped = f"the {split} text ({self.read[split]['bytes']} bytes)", _counts(self.dropped[split])
            raise ValueError(f"{text} {lack}; left out: {dropped}; give more text, higher limits or a shorter context")
        return writer


def _read_blocks(blocks: Dataset) -> np.ndarray:
    """(N, T) int64 token ids."""
    return np.stack(blocks.with_format("numpy")["input_ids"][:]).astype(np.int64)


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "nothing"
