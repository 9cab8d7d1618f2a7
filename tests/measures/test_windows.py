"""Windows of a text, and the memory that they need."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tokenizers import processors
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    RobertaConfig,
    RobertaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from normfree.measures.measurement import measure
from normfree.measures.windows import memory_estimate, token_windows
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
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaForCausalLM(RobertaConfig(**sizes, max_position_embeddings=34, pad_token_id=1, is_decoder=True))
    ids_NT = token_windows(roberta, tokenizer, TEXT, context=None, sequences=2)
    assert ids_NT.shape[1] == 32
    assert measure(roberta, ids_NT)["rows"].tolist() == [[64, 64]]
    xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=256, d_model=32, n_layer=1, n_head=2, d_inner=32))
    assert token_windows(xlnet, tokenizer, TEXT, context=40, sequences=1).shape == (1, 40)


def test_the_estimate_is_linear_and_quadratic_in_eager(model):
    linear = [memory_estimate(model, batch=1, context=t, method="auto") for t in (1000, 2000, 3000)]
    square = [memory_estimate(model, batch=1, context=t, method="eager") for t in (1000, 2000, 3000)]
    assert linear[2] - linear[1] == linear[1] - linear[0]
    assert square[2] - square[1] > 1.5 * (square[1] - square[0])
    model.set_attn_implementation("eager")  # as gemma2 and gpt_oss are loaded: it makes T x T matrices of its own
    own = memory_estimate(model, batch=1, context=1000, method="auto")
    assert own - linear[0] == 3 * model.config.n_head * 1000**2 * 4


def test_the_estimate_takes_the_widest_of_listed_layers():
    """3 activations of 64 instead of 48 elements, 4 bytes each, for 32 tokens; and the weights of one such layer."""
    sizes, weights = [], []
    for widths in ([48, 48], [48, 64]):
        config = Gemma3nTextConfig(
            vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, intermediate_size=widths,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=2,
            layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0, 0.0],
        )  # fmt: skip
        model = Gemma3nForCausalLM(config)
        sizes.append(memory_estimate(model, batch=1, context=32, method="auto"))
        weights.append(4 * model.num_parameters())
    assert sizes[1] - sizes[0] == 32 * 3 * (64 - 48) * 4 + weights[1] - weights[0]


@pytest.mark.slow
@pytest.mark.parametrize(("vocabulary", "width", "context"), [(65_536, 64, 1024), (512, 1024, 512)])
def test_the_estimate_of_an_evaluation_is_near_its_peak(vocabulary, width, context):
    """In a process of its own: the peak of a process never falls."""
    script = f"""
import psutil, torch
from transformers import GPT2Config, GPT2LMHeadModel
from normfree.measures.windows import evaluation_estimate
from normfree.measures.measurement import peak_memory_mib
from normfree.measures.perplexity import evaluate_blocks
config = GPT2Config(vocab_size={vocabulary}, n_embd={width}, n_layer=4, n_head=4, n_positions={context})
with torch.device("meta"):
    needed = evaluation_estimate(GPT2LMHeadModel(config), context={context})
used = psutil.Process().memory_info().rss
evaluate_blocks(GPT2LMHeadModel(config), torch.zeros(1, {context}, dtype=torch.long))
print((used + needed) / 2**20 / peak_memory_mib(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1, abs=0.25)
