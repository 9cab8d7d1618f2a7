"""A byte-level BPE at several times the speed: tiktoken, built from the same tokenizer.json.

tokenizers merges the pairs of a list, in the order of the list; tiktoken merges any neighbours whose bytes together
are a piece, in the order of the pieces. Both give the same pieces where every piece has one merge and comes out whole
when it is encoded alone: as long as no merge crosses the borders of a piece, its bytes merge as if they stood alone,
so the neighbours that may form it are always those of its one merge. That is checked for every piece. The cut
into words is one regular expression in two engines with Unicode tables of their own: every character is compared the
first time it is met. A sample of the text is compared as well, in case a library is not what this takes it for.

Shapes: R ranks (256 bytes, then the merges in order), V pieces of the vocabulary, S tokens of a document.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from normfree.data.tokenizer import END_TOKEN, Encoder

# The expression behind `ByteLevel(use_regex=True)`: contractions, letters, numbers, other signs, blanks.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
"""Fields of a BPE that must be unset."""
COMPARED_SHARE = 100
"""One document in so many is also encoded by tokenizers: 1 % of the text costs about 5 % of the encoding."""
COMPARED_CHARACTERS = 20_000
"""At most this much of such a document."""
CHARACTERS = 0x110000
ENDINGS = ("s", "t", "re", "ve", "m", "ll", "d", "S", "RE", "x")
BLANKS = (" ", "\n", "\t", "\r\n", " \n", "\u00a0", "\u3000")
ADVERSARIAL = (
    *(blank * count + end for blank in BLANKS for count in (1, 2, 3, 7, 90) for end in ("", "x", "\n")),
    *(f"a{sign}{second}b {sign}{second}" for sign in map(chr, range(128)) for second in "a1 .'\n"),
    *(f"{word}'{end}" for word in ("it", " I", "9", "_") for end in ENDINGS),
    *(piece * count for piece in ("a", "ab", "the", "0", "=", "\u00e9") for count in (2, 3, 5, 17, 499, 500, 2001)),
    "x = 1_000.5e-10; y = '\\u00e9'  # caf\u00e9 \u00a7\u00b2\u00bd\u0661 e\u0301 \u0939\u093f\u0928\u094d \ud55c",
    "\U0001f469\u200d\U0001f680\U0001f1e9\U0001f1ea\ufe0f\u200b\ufeff\u2028\u2029\x85\x00\x7f\U0010ffff",
)

log = logging.getLogger("normfree")


class NotReproducibleError(Exception):
    """tiktoken does not, or may not, give the ids of this tokenizer; the message says why."""


class FastEncoder:
    """What `Encoder` does, with the same ids or NotReproducibleError, from the constructor or from any later call."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        backend = tokenizer.backend_tokenizer
        description = json.loads(backend.to_str())
        _refuse_other_kinds(description)
        self._library = Encoder(tokenizer)
        self._encoding, self._ids_R = _tiktoken(description["model"])
        self._threads = len(os.sched_getaffinity(0))
        _refuse_unreachable_pieces(backend, description["model"]["merges"])
        if self._library.bytes_V is None:
            raise NotReproducibleError("only offsets say how much text the tokens of the tokenizer stand for")
        self._bytes_V = self._library.bytes_V
        self._characters = _SameCuts()
        specials = [token["content"] for token in description["added_tokens"]]
        self._compare([*ADVERSARIAL, *specials, *(f"a {special}{special}\n" for special in specials)])
        log.info("encoding with tiktoken on %d threads: its ids are those of tokenizers", self._threads)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One (S, 1) int32 array of token ids a text."""
        return self._encode(texts, lambda ids_S: ids_S[:, None])

    def encode_with_bytes(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One (S, 2) int32 array a text: token ids, and UTF-8 bytes that sum to the size of the text."""
        return self._encode(texts, lambda ids_S: np.stack([ids_S, self._bytes_V[ids_S]], axis=1))

    def _encode(self, texts: Sequence[str], arrange: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
        for text in texts:
            self._characters.compare(text)
        self._compare([text[:COMPARED_CHARACTERS] for text in texts[::COMPARED_SHARE]])
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(lambda text: arrange(self._ids(text)), texts))

    def _ids(self, text: str) -> np.ndarray:
        try:
            ranks_S = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # The regular expression gives up on hundreds of thousands of blanks in a row; tokenizers does not.
            return self._library.encode([text])[0][:, 0]
        return self._ids_R[ranks_S]

    def _compare(self, texts: Sequence[str]) -> None:
        for text, expected_S1 in zip(texts, self._library.encode(texts), strict=True):
            if not np.array_equal(self._ids(text), expected_S1[:, 0]):
                raise NotReproducibleError(f"tiktoken gives other ids for {text[:80]!r}")


def _refuse_other_kinds(description: dict[str, Any]) -> None:
    model, cut = description["model"], description["pre_tokenizer"] or {}
    if model["type"] != "BPE" or any(model[name] for name in OPTIONS):
        raise NotReproducibleError(f"the tokenizer's model is {model['type']}, not a BPE without options")
    if description["normalizer"] is not None:
        raise NotReproducibleError("the tokenizer has a normalizer")
    if (cut.get("type"), cut.get("add_prefix_space"), cut.get("use_regex")) != ("ByteLevel", False, True):
        raise NotReproducibleError("the tokenizer does not cut words as ByteLevel(add_prefix_space=False) does")
    plain = [token["content"] for token in description["added_tokens"] if not token["special"]]
    if plain:
        raise NotReproducibleError(f"the tokenizer has added tokens that are not special, such as {plain[0]!r}")


def _tiktoken(model: dict[str, Any]) -> tuple[tiktoken.Encoding, np.ndarray]:
    """The encoding whose tokens are ranks, and the token id of each rank, ids_R."""
    bytes_of = {character: bytes([value]) for character, value in byte_of_character().items()}
    pieces = [*bytes_of, *(left + right for left, right in model["merges"])]
    missing = sum(piece not in model["vocab"] for piece in pieces)
    if missing or len(set(pieces)) != len(pieces):
        raise NotReproducibleError(
            f"{missing} bytes have no piece" if missing else "two merges of the tokenizer give one piece"
        )
    try:
        ranks = {b"".join(map(bytes_of.__getitem__, piece)): rank for rank, piece in enumerate(pieces)}
    except KeyError:
        raise NotReproducibleError("pieces of the tokenizer are not made of bytes") from None
    # One special token, never allowed: with none at all tiktoken looks for one at every character, 1.7 times slower.
    special = {END_TOKEN: len(ranks)}
    encoding = tiktoken.Encoding("normfree", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)
    return encoding, np.array([model["vocab"][piece] for piece in pieces], dtype=np.int32)


def byte_of_character() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary: visible bytes are themselves, others start at 256."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = {character: ord(character) for character in characters if ord(character) < 256}
    hidden = sorted(set(range(256)) - set(visible.values()))
    return visible | dict(zip(characters[len(visible) :], hidden, strict=True))


def _refuse_unreachable_pieces(tokenizer: Tokenizer, merges: Iterable[tuple[str, str]]) -> None:
    for left, right in merges:
        if len(tokenizer.model.tokenize(left + right)) != 1:
            raise NotReproducibleError(f"the merges of the tokenizer never give its piece {left + right!r}")


class _SameCuts:
    """Whether both engines take a character for the same: letter, number, blank or other sign.

    Asked of a vocabulary that merges nothing but a letter, a digit or a point with the byte beside it, so that the
    pieces show on which side of the character a word ends. All 1,112,064 characters were equal in tokenizers 0.23.3 and
    tiktoken 0.14.0.
    """

    def __init__(self) -> None:
        character_of = {value: character for character, value in byte_of_character().items()}
        sides = [character_of[value] for value in range(128, 256)]
        merges = [pair for sign in "a1." for side in sides for pair in ((sign, side), (side, sign))]
        vocab = {piece: number for number, piece in enumerate([*character_of.values(), *map("".join, merges)])}
        self._tokenizer = Tokenizer(models.BPE(vocab, merges))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        self._encoding, self._ids_R = _tiktoken({"vocab": vocab, "merges": merges})
        self._known = np.zeros(CHARACTERS, dtype=bool)
        self._known[:128] = True

    def compare(self, text: str) -> None:
        """Raises NotReproducibleError for a character that is cut differently. ASCII is compared with ADVERSARIAL."""
        if text.isascii():
            return
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        for code in np.unique(codes[~self._known[codes]]).tolist():
            probe = "a{0}a 1{0}1 .{0}.".format(chr(code))
            ranks = self._encoding.encode_ordinary(probe)
            if self._ids_R[ranks].tolist() != self._tokenizer.encode(probe).ids:
                raise NotReproducibleError(f"tiktoken and tokenizers cut words differently at U+{code:04X}")
            self._known[code] = True
