"""Cut documents of token ids into blocks of T tokens, and write blocks to Arrow.

Shapes: S tokens of a document, N blocks, T tokens in a block, V pieces of the vocabulary, C columns: token ids, and for
held-out text the UTF-8 bytes of each token and the number of its document.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow

BLOCKS_AT_ONCE = 4096
Item = TypeVar("Item", bound=Sized)


def windows(documents: Iterable[np.ndarray], context: int) -> Iterator[np.ndarray]:
    """Cut each (S, C) document by itself into (N, T, C) blocks without overlap; the tail shorter than T is dropped."""
    for document_SC in documents:
        count = len(document_SC) // context
        yield document_SC[: count * context].reshape(count, context, document_SC.shape[1])


def concatenated(documents: Iterable[np.ndarray], context: int, *, end: int) -> Iterator[np.ndarray]:
    """Join all (S, C) documents, with token `end` (0 bytes) after each, and cut them into full (N, T, C) blocks."""
    rest_SC = None
    for number, document_SC in enumerate(documents):
        end_1C = np.zeros_like(document_SC, shape=(1, document_SC.shape[1]))
        end_1C[0, 0] = end
        end_1C[0, 2:] = number
        row_SC = np.concatenate([document_SC, end_1C] if rest_SC is None else [rest_SC, document_SC, end_1C])
        whole = len(row_SC) - len(row_SC) % context
        yield row_SC[:whole].reshape(-1, context, row_SC.shape[1])
        rest_SC = row_SC[whole:]


class BlockWriter:
    """Stream blocks into one Arrow file, and count and hash their tokens.

    A block has one to three columns: token ids, UTF-8 bytes of each token, number of its document. With the second the
    file has a column `predicted_bytes`, the sum over tokens 2..T, with the third `document`, a number for each token.
    `targets` gives the only tokens of rows (N, T) that are counted, all of them predicted.
    """

    def __init__(
        self, path: Path, *, vocab_size: int, targets: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        self.blocks = 0
        self.predicted_bytes = 0
        self.counts_V = np.zeros(vocab_size, dtype=np.int64)  # of each piece in all blocks
        self.predicted_counts_V = np.zeros(vocab_size, dtype=np.int64)  # at positions 2..T of a block
        self._path, self._targets = path, targets
        self._hash = hashlib.sha256()

    def write_all(self, blocks: Iterable[np.ndarray]) -> None:
        """Write every (N, T, C) array of `blocks`."""
        writer = None
        with pyarrow.OSFile(str(self._path), "wb") as file, ExitStack() as stack:
            # Each table costs a count over the vocabulary, and short documents fill few blocks or none.
            for arrays in in_groups(filter(len, blocks), BLOCKS_AT_ONCE):
                table = self._table(np.concatenate(arrays))
                writer = writer or stack.enter_context(pyarrow.ipc.new_stream(file, table.schema))
                writer.write_table(table)

    def _table(self, blocks_NTC: np.ndarray) -> pyarrow.Table:
        ids_NT = np.ascontiguousarray(blocks_NTC[:, :, 0], dtype="<i4")
        self.blocks += len(ids_NT)
        self._hash.update(ids_NT.tobytes())
        counted, predicted = (self._targets(ids_NT),) * 2 if self._targets else (ids_NT, ids_NT[:, 1:])
        self.counts_V += np.bincount(counted.reshape(-1), minlength=len(self.counts_V))
        self.predicted_counts_V += np.bincount(predicted.reshape(-1), minlength=len(self.counts_V))
        columns = {"input_ids": _column_of_rows(ids_NT)}
        if blocks_NTC.shape[2] > 1:
            predicted_bytes_N = blocks_NTC[:, 1:, 1].sum(axis=1, dtype=np.int32)
            self.predicted_bytes += int(predicted_bytes_N.sum())
            columns["predicted_bytes"] = pyarrow.array(predicted_bytes_N)
        if blocks_NTC.shape[2] > 2:
            columns["document"] = _column_of_rows(blocks_NTC[:, :, 2])
        return pyarrow.table(columns)

    @property
    def content_hash(self) -> str:
        """sha256 of all token ids as little-endian int32, the same on every machine."""
        return self._hash.hexdigest()


def _column_of_rows(values_NT: np.ndarray) -> pyarrow.Array:
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values_NT.reshape(-1)), values_NT.shape[1])


def in_groups(items: Iterable[Item], enough: int) -> Iterator[list[Item]]:
    """Lists of items whose lengths sum to `enough` or more, but for the last."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += len(item)
        if total >= enough:
            yield group
            group, total = [], 0
    if group:
        yield group


def unigram_perplexity(train_counts_V: np.ndarray, predicted_counts_V: np.ndarray) -> float:
    """Perplexity of predicted tokens under the add-one smoothed unigram distribution of training tokens."""
    probability_V = (train_counts_V + 1) / (train_counts_V.sum() + len(train_counts_V))
    nats = -(predicted_counts_V * np.log(probability_V)).sum() / predicted_counts_V.sum()
    return float(np.exp(nats))
