"""A byte-level BPE at several times the speed: tiktoken, built from the same tokenizer.json.

tokenizers merges pairs in the order of its list of merges. tiktoken merges any two neighbours whose joined bytes are a
piece, in the order of the pieces. Both give the same ids if every piece comes from one merge and comes out whole when
it is encoded alone: as long as no merge crosses the borders of a piece, its bytes merge as if they stood alone, so the
neighbours that form it are always those of its one merge. `FastEncoder` checks this for every piece. The two libraries
also split text into words with regular expression engines of their own, so it compares a sample of the text. (All
1,112,064 characters were in equal classes in tokenizers 0.23.3 and tiktoken 0.14.0.)

Shapes: R ranks (256 bytes, then the merges in order), V pieces of the vocabulary, S tokens of a document.
"""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tiktoken
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from normfree.data.tokenizer import END_TOKEN, Encoder

# The expression behind `ByteLevel(use_regex=True)`: contractions, letters, numbers, other signs, blanks.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UNSET_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
COMPARED_SHARE = 100  # one document in so many is also encoded by tokenizers: about 5 % of the time
COMPARED_CHARACTERS = 20_000  # of such a document
log = logging.getLogger("normfree")


class NotReproducibleError(Exception):
    """tiktoken does not, or may not, give the ids of this tokenizer; the message says why."""


class FastEncoder(Encoder):
    """Encode as `Encoder` does, with the same ids; any call may raise NotReproducibleError instead."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        if self.bytes_V is None:
            raise NotReproducibleError("the tokenizer is no byte-level one without a normalizer and added words")
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        model, splitter = description["model"], description["pre_tokenizer"] or {}
        if model["type"] != "BPE" or any(model[name] for name in UNSET_OPTIONS):
            raise NotReproducibleError(f"the tokenizer's model is {model['type']}, not a BPE without options")
        if not {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}.items() <= splitter.items():
            raise NotReproducibleError("the tokenizer does not split words as ByteLevel(add_prefix_space=False) does")
        self._encoding, self._ids_R = _tiktoken(model)
        for left, right in model["merges"]:
            if len(tokenizer.backend_tokenizer.model.tokenize(left + right)) != 1:
                raise NotReproducibleError(f"the merges of the tokenizer never give its piece {left + right!r}")
        self._threads = len(os.sched_getaffinity(0))
        log.info("Tokenizing the text (%d threads)", self._threads)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One (S, 1) int32 array of token ids for each text."""
        sample = [text[:COMPARED_CHARACTERS] for text in texts[::COMPARED_SHARE]]
        for text, expected_S1 in zip(sample, super().encode(sample), strict=True):
            if not np.array_equal(self._encode_one(text), expected_S1):
                raise NotReproducibleError(f"tiktoken gives other ids for {text[:80]!r}")
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(self._encode_one, texts))

    def _encode_one(self, text: str) -> np.ndarray:
        try:
            return self._ids_R[self._encoding.encode_to_numpy(text, disallowed_special=())][:, None]
        except ValueError:
            # The regular expression gives up on hundreds of thousands of blanks in a row; tokenizers does not.
            return super().encode([text])[0]


def _tiktoken(model: dict[str, Any]) -> tuple[tiktoken.Encoding, np.ndarray]:
    """The encoding whose tokens are ranks, and the token id of each rank, ids_R."""
    bytes_of = {character: bytes([value]) for value, character in bytes_to_unicode().items()}
    pieces = [*bytes_of, *(left + right for left, right in model["merges"])]
    if len(set(pieces)) != len(pieces):
        raise NotReproducibleError("two merges of the tokenizer give one piece")
    try:
        ids_R = np.array([model["vocab"][piece] for piece in pieces], dtype=np.int32)
        ranks = {b"".join(map(bytes_of.__getitem__, piece)): rank for rank, piece in enumerate(pieces)}
    except KeyError:
        raise NotReproducibleError("the pieces of the tokenizer are not all bytes and merges of bytes") from None
    # One special token, never allowed: with none at all tiktoken looks for one at every character, 1.7 times slower.
    special = {END_TOKEN: len(ranks)}
    return tiktoken.Encoding("normfree", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special), ids_R
