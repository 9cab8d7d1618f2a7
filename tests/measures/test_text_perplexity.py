import math
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedTokenizerFast

from normfree import measure
from normfree.measures.perplexity import Evaluation, Perplexity, evaluate_blocks, sees_later_tokens
from normfree.measures.text_perplexity import checked_context, perplexity, token_windows
from tests.entropy.families import tiny_model
from tests.measures.byte_model import TEXT
from tests.small_model import small_model


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=16, n_embd=32, n_layer=2, n_head=2)).train()


@pytest.fixture
def bos_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As Llama's: it begins a text with its BOS token. Here that is the byte 0."""
    tokenizer.bos_token = "\u0100"  # how byte-level BPE writes the byte 0
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def by_hand(model: GPT2LMHeadModel, ids: list[int], context: int, stride: int, leading: list[int]) -> list[float]:
    """Nats of each predicted token, one forward pass a token, as slowly as possible."""
    model.eval()
    nats = []
    for position in range(len(ids)):
        start = 0
        while position >= start + context - len(leading):
            start += stride
        seen = [*leading, *ids[start:position]]
        if not seen:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([seen])).logits[0, -1].double()
        nats.append(-torch.log_softmax(logits, -1)[ids[position]].item())
    return nats


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
@pytest.mark.parametrize(("context", "stride"), [(16, None), (16, 5), (8, 1), (2, 1)])
def test_each_token_is_predicted_once_from_its_window(model, name, context, stride, request):
    """Behind a BOS token every token is predicted, else all but the first of a window without overlap."""
    tokenizer = request.getfixturevalue(name)
    text = "def f(x):\n    return x + 1  # a comment, rather long"
    leading = tokenizer(text)["input_ids"][: -len(text)]
    ids = tokenizer(text)["input_ids"][-len(text) :]
    expected = by_hand(model, ids, context, stride or context - len(leading), leading)
    result = perplexity(model, tokenizer, text, context=context, stride=stride)
    assert result.tokens == result.bytes == len(expected)
    assert result.tokens == len(text) or not leading
    assert result.nats == pytest.approx(sum(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(sum(expected) / result.bytes / math.log(2), rel=1e-5)


def test_a_sample_spreads_its_windows_over_the_text(model, tokenizer):
    text = string.ascii_letters + string.digits + string.punctuation[:18]  # 80 tokens, five windows
    whole = [perplexity(model, tokenizer, text[at : at + 16], context=16).loss_nats for at in (0, 32, 64)]
    sample = perplexity(model, tokenizer, text, context=16, sequences=3)
    assert sample.loss_nats == pytest.approx(sum(whole) / 3, rel=1e-6)
    assert (sample.tokens, sample.bytes) == (3 * 15, 3 * 15)


def test_bos_follows_the_tokenizer_by_default(model, bos_tokenizer):
    text = "for word in words"
    with_bos, plain = (perplexity(model, bos_tokenizer, text, bos=wanted).nats for wanted in (True, False))
    assert with_bos != plain
    assert perplexity(model, bos_tokenizer, text).nats == with_bos
    bos_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()  # as GPT-2's: it has a BOS, and adds none
    assert perplexity(model, bos_tokenizer, text).nats == plain
    assert perplexity(model, bos_tokenizer, text, bos=True).nats == with_bos


def test_our_models_get_no_bos_token_by_default(bos_tokenizer):
    model, text = small_model(vocab_size=256), "for word in words"
    default, without, with_bos = (perplexity(model, bos_tokenizer, text, bos=bos) for bos in (None, False, True))
    assert (default, default.tokens + 1) == (without, with_bos.tokens)


@pytest.mark.parametrize("stride", [8, 3, 1])
def test_bytes_do_not_depend_on_trimmed_offsets(model, tokenizer, stride):
    """As those of GPT-NeoX and RoBERTa do."""
    text = "for word in words :\n    yield word  # and so on"
    plain = perplexity(model, tokenizer, text, context=8, stride=stride)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trimmed = perplexity(model, tokenizer, text, context=8, stride=stride)
    assert (trimmed.nats, trimmed.tokens) == (plain.nats, plain.tokens)
    assert trimmed.bytes == plain.bytes


def test_blanks_at_the_end_of_a_text_are_bytes(model):
    """Their offsets are empty, and at their beginning, where a tokenizer trims offsets."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:255]
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"\u0120\u0120": 255}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u0120", "\u0120")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    result = perplexity(model, PreTrainedTokenizerFast(tokenizer_object=inner), "for word:  ", context=16)
    assert (result.tokens, result.bytes) == (9, 10)


def test_a_tokenizer_without_offsets_gives_a_perplexity_and_no_bytes():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    result = perplexity(model, ByT5Tokenizer(), "abcdefghij", context=16)  # it begins no text with a BOS token
    assert (result.tokens, result.bytes) == (9, 0)
    assert math.isfinite(result.perplexity)
    assert math.isnan(result.bits_per_byte)


@pytest.mark.parametrize("vocabulary", [4096, 262_144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_exact_to_eleven_digits_whatever_the_vocabulary(vocabulary, dtype):
    """In float32 the sum over 262,144 tokens is off by 1e-5 nats a token, always to the same side."""
    logits = (3 * torch.randn(2, 9, vocabulary, generator=torch.Generator().manual_seed(0))).to(dtype)
    labels = torch.arange(18).view(2, 9)
    labels[1, 4] = -100
    wide = logits.double()[:, :-1]
    nats = torch.log(torch.exp(wide).sum(-1)) - wide.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    expected = nats[labels[:, 1:] >= 0].sum().item()
    added = Perplexity(torch.nn.Module())
    added.add(logits, labels)
    assert added.passes == [(pytest.approx(expected, rel=1e-11), 15)]


def test_losses_of_documents_add_up_to_those_of_the_blocks(model):
    blocks = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(1))
    documents = np.repeat([[3], [3], [3], [7], [9]], 16, axis=1)
    documents[2, 9:] = 7  # a document may end inside a block
    result = evaluate_blocks(model, blocks, batch_sequences=2, documents_NT=documents)
    logits = model.eval()(blocks).logits[:, :-1].double().log_softmax(-1)
    nats = -logits.gather(-1, blocks[:, 1:, None])[..., 0].detach().numpy()
    expected = [(nats[documents[:, 1:] == number].sum(), (documents[:, 1:] == number).sum()) for number in (3, 7, 9)]
    assert np.array(result.parts) == pytest.approx(np.array(expected), rel=1e-6)
    assert result.nats == pytest.approx(sum(part for part, _ in result.parts))


def test_intervals_over_documents_are_those_of_scipy():
    """Of 40 documents of unlike length, alone and against another model on the same ones."""
    random = np.random.default_rng(1)
    tokens = random.integers(50, 500, 40)
    nats = tokens * random.normal(3, 0.5, 40)
    others = nats - tokens * random.normal(0.1, 0.05, 40)
    one, other = (
        Evaluation(parts.sum(), tokens.sum(), parts=tuple(zip(parts, tokens, strict=True))) for parts in (nats, others)
    )
    for interval, parts in ((one.interval(), nats), (one.interval(other), nats - others)):
        options = {"paired": True, "vectorized": True, "method": "percentile", "rng": 2}
        ratio = bootstrap((parts, tokens), lambda a, b, axis: a.sum(axis) / b.sum(axis), **options)
        expected = ratio.confidence_interval
        assert interval == pytest.approx(tuple(expected), abs=0.1 * (expected.high - expected.low))
    assert all(map(math.isnan, Evaluation(1.0, 1, parts=((1.0, 1),)).interval()))


def test_batches_are_smaller_where_their_logits_would_not_fit(model, monkeypatch):
    blocks = torch.randint(0, 256, (10, 16), generator=torch.Generator().manual_seed(1))
    whole, sizes = evaluate_blocks(model, blocks, batch_sequences=10), []
    monkeypatch.setattr("normfree.measures.held_out.LARGEST_LOGITS", 3 * 16 * 256)
    model.register_forward_hook(lambda *call: sizes.append(len(call[-1].logits)))
    assert evaluate_blocks(model, blocks, batch_sequences=10).nats == pytest.approx(whole.nats, rel=1e-6)
    assert sizes == [1, 1, 3, 3, 3, 1]  # the first two prove that the model is causal


def test_evaluation_leaves_the_training_mode_as_found(model):
    model.transformer.h[0].eval()
    evaluate_blocks(model, torch.zeros(1, 4, dtype=torch.long))
    assert model.training
    assert not model.transformer.h[0].training
    with pytest.raises(IndexError):
        evaluate_blocks(model, torch.full((1, 4), 999))
    assert model.training


def test_what_cannot_be_evaluated_is_refused(model, tokenizer):
    for options, message in (({"context": 8, "stride": 9}, "stride=9"), ({"bos": True}, "no BOS token")):
        with pytest.raises(ValueError, match=message):
            perplexity(model, tokenizer, "abc", **options)
    model.resize_token_embeddings(20)  # the tokenizer is another model's
    with pytest.raises(ValueError, match="vocabulary has 20"):
        perplexity(model, tokenizer, "zzz")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "xlnet", "llama"])
def test_a_model_that_sees_later_tokens_has_no_perplexity(tokenizer, family, dtype):
    model = tiny_model(family, vocab_size=256, is_decoder=False, is_causal=False).to(dtype)
    for text in ("ab", "abc", "a" * 300, "for word in words: yield word"):
        with pytest.raises(ValueError, match=r"is not causal: later tokens"):
            perplexity(model, tokenizer, text, context=64)
    with pytest.raises(ValueError, match=r"is not causal: later tokens"):
        evaluate_blocks(model, torch.randint(0, 256, (2, 33)))


def test_tokens_that_see_their_own_block_are_later_tokens_too(model):
    """As models do that write a block at a time."""
    forward = model.forward
    for size in (2, 4, 8, 16):
        blocks = torch.arange(16) // size
        mask_BHTT = torch.where(blocks[:, None] >= blocks, 0.0, -torch.inf).expand(1, 1, 16, 16)
        model.forward = lambda *ids, mask=mask_BHTT, **named: forward(*ids, **named | {"attention_mask": mask})
        assert sees_later_tokens(model, torch.arange(16)[None])
        model.forward = forward
        assert not sees_later_tokens(model, torch.arange(16)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "bert"])
def test_regrouping_experts_do_not_count_as_later_tokens(family, dtype):
    model = tiny_model(family).to(dtype)
    for seed in range(3):
        ids = torch.randint(0, 96, (1, 64), generator=torch.Generator().manual_seed(seed))
        assert not sees_later_tokens(model, ids)


@pytest.mark.parametrize("name", ["max_seq_len", "n_ctx", "seq_length", "max_sequence_length", "model_max_length"])
def test_the_limit_of_a_context_has_many_names(name):
    text = PreTrainedConfig(**{name: 48})
    for config in (text, SimpleNamespace(get_text_config=lambda: text)):  # a multimodal model has that of its text
        model = SimpleNamespace(named_modules=list, config=config)
        assert checked_context(model, None) == 48
        with pytest.raises(ValueError, match="context=49 must be between 2 and the model's 48"):
            checked_context(model, 49)


def test_nothing_counted_is_not_a_number():
    assert math.isnan(Evaluation(0.0, 0).perplexity)
    assert math.isnan(Evaluation(1.0, 1).bits_per_byte)
    assert Evaluation(1e6, 1).perplexity == math.inf


def test_windows_are_spread_over_the_text(model, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    windows_NT = token_windows(model, tokenizer, TEXT, context=16, sequences=3)
    whole = len(ids) // 16
    assert windows_NT[0].tolist() == ids[:16]
    assert windows_NT[-1].tolist() == ids[16 * (whole - 1) : 16 * whole]
    assert token_windows(model, tokenizer, TEXT, context=None, sequences=1).shape == (1, 16)
    assert token_windows(model, tokenizer, "short", context=16, sequences=9).shape == (1, 5)


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
        (TEXT, 17, "context=17 must be between 2 and the model's 16"),
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
