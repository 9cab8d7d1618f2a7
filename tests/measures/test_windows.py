"""Windows of a text, and the memory that they need."""

import pytest
from tokenizers import processors

from normfree.measures.measurement import measure
from normfree.measures.text_perplexity import token_windows
from tests.entropy.families import tiny_model
from tests.measures.byte_model import TEXT


def test_windows_are_spread_over_the_text(model, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    windows_NT = token_windows(model, tokenizer, TEXT, context=16, sequences=3)
    whole = len(ids) // 16
    assert windows_NT[0].tolist() == ids[:16]
    assert windows_NT[-1].tolist() == ids[16 * (whole - 1) : 16 * whole]
    assert token_windows(model, tokenizer, TEXT, context=None, sequences=1).shape == (1, 64)
    assert token_windows(model, tokenizer, "short", context=64, sequences=9).shape == (1, 5)


def test_a_window_needs_room_behind_its_leading_tokens(model, tokenizer):
    ids = tokenizer("d")["input_ids"]
    leading = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("\u0100", "\u0101")]  # the bytes 0 and 1
    template = processors.TemplateProcessing("\u0100 \u0101 $A", special_tokens=leading)
    tokenizer.backend_tokenizer.post_processor = template
    windows_NT = token_windows(model, tokenizer, TEXT, context=3, sequences=2)
    assert windows_NT[0].tolist() == [number for _, number in leading] + ids
    assert windows_NT[1, :2].tolist() == [number for _, number in leading]
    with pytest.raises(ValueError, match="context=2 leaves no room for text behind 2 leading tokens"):
        token_windows(model, tokenizer, TEXT, context=2, sequences=1)


@pytest.mark.parametrize(
    ("text", "context", "message"),
    [
        ("a", None, r"has 1 token\(s\); at least 2"),
        (TEXT, 65, "context=65 must be between 2 and the model's 64"),
        (TEXT, 1, "context=1 must be"),
    ],
)
def test_texts_and_contexts_that_do_not_fit_are_refused(model, tokenizer, text, context, message):
    with pytest.raises(ValueError, match=message):
        token_windows(model, tokenizer, text, context=context, sequences=1)


def test_the_default_context_fits_roberta_and_xlnet(tokenizer):
    """RoBERTa's positions begin behind padding, XLNet's never end."""
    roberta = tiny_model("roberta", vocab_size=256, max_position_embeddings=34, pad_token_id=1)
    ids_NT = token_windows(roberta, tokenizer, TEXT, context=None, sequences=2)
    assert ids_NT.shape[1] == 32
    assert measure(roberta, ids_NT)["rows"].tolist() == [[64] * 4] * 2
    xlnet = tiny_model("xlnet", vocab_size=256)
    assert token_windows(xlnet, tokenizer, TEXT, context=40, sequences=1).shape == (1, 40)
