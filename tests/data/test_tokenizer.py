"""The tokenizer gives back every text, and counts its bytes."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from normfree.data.tokenizer import END_TOKEN, Encoder, load_tokenizer, train_tokenizer, vocabulary_size

TEXTS = [f"for index_{number} in range({number}):\n    print('naive caf\u00e9 {number}')\n" for number in range(200)]
TOKENIZER = train_tokenizer(TEXTS, 320)
ENCODER = Encoder(TOKENIZER)


@given(text=st.text())
@example(text=f"a{END_TOKEN}b")
def test_any_unicode_text_round_trips_and_its_bytes_add_up(text: str) -> None:
    [document_SC] = ENCODER.encode_with_bytes([text])
    assert TOKENIZER.eos_token_id not in document_SC[:, 0]
    assert TOKENIZER.decode(document_SC[:, 0].tolist(), clean_up_tokenization_spaces=False) == text
    assert document_SC[:, 1].sum() == len(text.encode())
    assert ENCODER.encode([text])[0][:, 0].tolist() == document_SC[:, 0].tolist()


def test_bytes_of_a_word_tokenizer_come_from_offsets() -> None:
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "caf\u00e9": 1, "noir": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    [document_SC] = Encoder(PreTrainedTokenizerFast(tokenizer_object=inner)).encode_with_bytes(["caf\u00e9  noir x"])
    assert document_SC.tolist() == [[1, 5], [2, 6], [0, 2]]


def test_bytes_add_up_with_added_words() -> None:
    """As runs of blanks in tokenizers for code; the last one includes the blanks before it."""
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.add_tokens([" " * count for count in range(2, 9)])
    tokenizer.add_tokens([AddedToken("indeed", lstrip=True, normalized=False)])
    text = "def f(x):\n        return x   indeed\n"
    [document_SC] = Encoder(tokenizer).encode_with_bytes([text])
    assert document_SC[:, 1].sum() == len(text.encode())
    assert {token: size for token, size in document_SC.tolist() if token >= 320} == {326: 8, 327: 9}


def test_a_blank_that_the_tokenizer_adds_is_no_byte() -> None:
    tokenizer = train_tokenizer(TEXTS, 320)
    blank = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), blank])
    [document_SC] = Encoder(tokenizer).encode_with_bytes(["import json"])
    assert document_SC[:, 1].sum() == 11


def test_the_vocabulary_reaches_to_the_highest_id() -> None:
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 7}, unk_token="[UNK]"))
    assert vocabulary_size(PreTrainedTokenizerFast(tokenizer_object=inner)) == 8
    assert vocabulary_size(TOKENIZER) == len(TOKENIZER) == 320


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer=.* cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
