"""The fast encoder gives the ids and bytes of tokenizers, or prepare() falls back to tokenizers."""

import inspect
import json
import logging
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from normfree.data import prepare, tiktoken_encoder
from normfree.data.tiktoken_encoder import FastEncoder, NotReproducibleError
from normfree.data.tokenizer import END_TOKEN, Encoder, train_tokenizer
from normfree.files import damages
from normfree.spec.run import DataSpec

CODE = [inspect.getsource(module) for module in (string, json, json.decoder, inspect, logging, pytest)]
TOKENIZER = train_tokenizer([*CODE, "caf\u00e9 na\u00efve \u4e2d\u6587 " * 50], 1200)
FAST, LIBRARY = FastEncoder(TOKENIZER), Encoder(TOKENIZER)

BLANKS = st.text(alphabet=" \t\n\r\x0b\x0c\x85\u00a0\u2003\u2028\u3000", min_size=1, max_size=40)
WORDS = st.sampled_from(
    ["def f(x):\n", "    return x", "it's", "I'LL", "x_1", "3.14e-10", "caf\u00e9", "\u0661\u0662", "e\u0301"]
)
SPECIALS = st.sampled_from([END_TOKEN, "<|endoftext|", "|>", "<|", "[UNK]", END_TOKEN * 2])
TEXTS = st.lists(st.one_of(WORDS, BLANKS, SPECIALS, st.text(max_size=20)), max_size=12).map("".join)


def assert_equal(texts: list[str], ours: FastEncoder = FAST, theirs: Encoder = LIBRARY) -> None:
    """Ids and byte counts of both encoders agree, and the bytes sum to the text."""
    for text, ids_S1, ours_S2, theirs_S2 in zip(
        texts, ours.encode(texts), ours.encode_with_bytes(texts), theirs.encode_with_bytes(texts), strict=True
    ):
        assert ids_S1[:, 0].tolist() == theirs_S2[:, 0].tolist()
        assert ours_S2.tolist() == theirs_S2.tolist()
        assert ours_S2[:, 1].sum() == len(text.encode())
        assert ids_S1.dtype == ours_S2.dtype == np.int32


@given(texts=st.lists(TEXTS, max_size=4))
def test_ids_and_bytes_are_those_of_tokenizers(texts: list[str]) -> None:
    assert_equal(texts)


def test_code_and_a_million_blanks_have_the_same_ids() -> None:
    assert_equal([*CODE, "", "\n", "x" + " " * 1_000_000 + "y"])
    assert len(FAST.encode(CODE)[3]) > 10_000


def changed(change: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerFast:
    """TOKENIZER with another tokenizer.json."""
    description = json.loads(TOKENIZER.backend_tokenizer.to_str())
    change(description)
    inner = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=TOKENIZER.eos_token)


def test_ids_in_any_order_are_reproduced() -> None:
    def reverse(description: dict[str, Any]) -> None:
        vocab = description["model"]["vocab"]
        description["model"]["vocab"] = {piece: len(vocab) - 1 - number for piece, number in vocab.items()}
        description["added_tokens"][0]["id"] = len(vocab) - 1

    tokenizer = changed(reverse)
    assert_equal([*CODE, END_TOKEN], FastEncoder(tokenizer), Encoder(tokenizer))


def with_merges(*pairs: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and these merges, each written as 'left right'."""
    merges = [(left, right) for left, right in map(str.split, pairs)]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    inner = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


PAIRS = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), min_size=1, max_size=12)
RUNS = st.lists(st.text(alphabet="ab", max_size=60), min_size=1, max_size=10)


@settings(max_examples=60)
@given(pairs=PAIRS, texts=RUNS)
def test_any_list_of_merges_is_refused_or_reproduced(pairs: list[tuple[int, int]], texts: list[str]) -> None:
    """Of 3,000 random lists 1,221 were accepted, all with equal ids; 1,481 of those refused gave other ids."""
    pieces, merges = ["a", "b"], []
    for left, right in ((pieces[x % len(pieces)], pieces[y % len(pieces)]) for x, y in pairs):
        if left + right not in pieces:
            pieces.append(left + right)
            merges.append(f"{left} {right}")
    tokenizer = with_merges(*merges)
    # Without comparisons, only the reasoning about merges can refuse.
    with patch.object(tiktoken_encoder, "COMPARED_CHARACTERS", 0):
        try:
            encoder = FastEncoder(tokenizer)
        except NotReproducibleError as reason:
            if "never give its piece" not in str(reason):
                raise
            return
        assert_equal([*texts, "a" * 40], encoder, Encoder(tokenizer))


def with_normalizer() -> PreTrainedTokenizerFast:
    tokenizer = with_merges("a b")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def with_added_word() -> PreTrainedTokenizerFast:
    tokenizer = with_merges("a b")
    tokenizer.add_tokens(["abab"])
    return tokenizer


def of_words() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


OTHERS = {
    "word level": (of_words, "WordLevel, not a BPE"),
    "normalizer": (with_normalizer, "has a normalizer"),
    "added word": (with_added_word, "added tokens that are not special"),
    "prefix": (lambda: changed(lambda d: d["pre_tokenizer"].update(add_prefix_space=True)), "does not split words"),
    "no words": (lambda: changed(lambda d: d["pre_tokenizer"].update(use_regex=False)), "does not split words"),
    "decoder": (lambda: changed(lambda d: d.update(decoder=None)), "only offsets say how many bytes"),
    "dropout": (lambda: changed(lambda d: d["model"].update(dropout=0.1)), "not a BPE without options"),
    "two merges": (lambda: with_merges("a b", "b c", "ab c", "a bc"), "two merges of the tokenizer give one piece"),
    "unreachable": (lambda: with_merges("a b", "b c", "a bc"), "never give its piece 'abc'"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_tokenizer_of_another_kind_is_refused(kind: str) -> None:
    build, reason = OTHERS[kind]
    with pytest.raises(NotReproducibleError, match=reason):
        FastEncoder(build())


def fingerprint_and_log(spec: DataSpec, cache: Path, caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="normfree"):
        corpus = prepare(spec, cache=cache, progress=False)
    assert damages(corpus.folder) == []
    return corpus.fingerprint, caplog.text


NO_EURO = tiktoken_encoder.WORDS.replace(r"\p{L}", r"[\p{L}\u20ac]")
# An expression that makes the two differ, the reason logged, and whether that shows before any text is encoded.
DIFFERENCES = {
    "ASCII": (r"\S+|\s+", "split words differently at U+00", True),
    "the text": (r" (?=return)|" + tiktoken_encoder.WORDS, "tiktoken gives other ids for", False),
    "beyond ASCII": (NO_EURO, "split words differently at U+20AC", False),
}


@pytest.mark.parametrize("packing", ["windows", "concatenate"])
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_other_ids_fall_back_with_the_same_fingerprint(spec, tmp_path, monkeypatch, caplog, packing, difference):
    Path(spec.paths[0], "file_0.py").write_text("price = '3 \u20ac 25'\n" * 40)
    spec = replace(spec, packing=packing)
    usual, line = fingerprint_and_log(spec, tmp_path / "usual", caplog)
    assert "Tokenizing the text (" in line
    assert "several times slower" not in line
    words, reason, at_once = DIFFERENCES[difference]
    monkeypatch.setattr(tiktoken_encoder, "WORDS", words)
    if difference != "the text":
        monkeypatch.setattr(tiktoken_encoder, "COMPARED_CHARACTERS", 0)
    fallen_back, line = fingerprint_and_log(spec, tmp_path / "other", caplog)
    assert fallen_back == usual
    assert "the text is encoded with tokenizers, several times slower than with tiktoken: " in line
    assert reason in line
    assert ("Tokenizing the text (" in line) != at_once
