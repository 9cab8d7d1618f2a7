"""Converted models compute what transformers' own models compute."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from normfree.pretrained.convert import ACTIVATION_NAMES, from_transformers

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


def randomised(model):
    """Every weight far from its start, so that a swapped bias or norm shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = "norm" in name.lower() or ".ln_" in name
            parameter.copy_(1 + 0.3 * noise if around_one and parameter.ndim == 1 else 0.2 * noise)
    return model.eval()


def gpt2(**fields):
    return randomised(GPT2LMHeadModel(GPT2Config(**SIZES, max_position_embeddings=64, **fields)))


def neox(share=0.25, parallel=True, **fields):
    fields |= {"rotary_pct": share, "use_parallel_residual": parallel}
    config = GPTNeoXConfig(**SIZES, intermediate_size=96, max_position_embeddings=64, **fields)
    return randomised(GPTNeoXForCausalLM(config))


def assert_parity(theirs):
    """Equal logits without padding, with left padding and position ids, and token by token with a cache."""
    ours = from_transformers(theirs)
    ids = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, plain, **TOLERANCE)
        padded = theirs(ids, attention_mask=mask, position_ids=positions).logits
        got = ours(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(got[mask.bool()], padded[mask.bool()], **TOLERANCE)
        assert not torch.allclose(got[0, -1], plain[0, -1], **TOLERANCE)
        cache, steps = None, []
        for step in range(ids.shape[1]):
            output = ours(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), plain, **TOLERANCE)


@pytest.mark.parametrize("activation", sorted(ACTIVATION_NAMES))
def test_gpt2_logits_are_equal(activation):
    assert_parity(gpt2(activation_function=activation))


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("parallel", [True, False])
def test_neox_logits_are_equal(share, parallel):
    assert_parity(neox(share, parallel))


def test_other_fields_are_equal():
    assert_parity(neox(rotary_emb_base=500.0, tie_word_embeddings=True))
    assert_parity(gpt2(tie_word_embeddings=False, n_inner=50, layer_norm_epsilon=1e-2, attn_implementation="eager"))


def test_converted_model_is_a_copy_that_saves_and_loads(tmp_path):
    theirs = gpt2()
    ours = from_transformers(theirs)
    ids = torch.randint(0, 61, (2, 9))
    before = ours(ids).logits
    torch.nn.init.zeros_(theirs.transformer.wte.weight)
    theirs.generation_config.max_new_tokens = 3
    assert torch.equal(ours(ids).logits, before)
    assert ours.generation_config.max_new_tokens is None
    ours.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, before)


def test_dtype_and_mode_are_kept():
    ours = from_transformers(neox().to(torch.bfloat16).train())
    assert ours.dtype == torch.bfloat16
    assert ours.training


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (lambda: gpt2(scale_attn_weights=False), "scale_attn_weights=False"),
        (lambda: gpt2(activation_function="silu"), "'silu'"),
        (lambda: neox(attention_bias=False), "attention_bias=False"),
        (lambda: neox(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_type='linear'"),
    ],
)
def test_unsupported_features_are_refused_by_name(build, words):
    with pytest.raises(ValueError, match=words):
        from_transformers(build())


def with_another_head(model, head):
    model.lm_head = head
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (with_another_head(gpt2(), torch.nn.Linear(32, 61, bias=False)), "tie_word_embeddings=True"),
        (with_another_head(gpt2(tie_word_embeddings=False), torch.nn.Linear(32, 61)), "cannot convert lm_head.bias:"),
        (with_another_head(neox(), torch.nn.Linear(32, 61)), "cannot convert lm_head.bias:"),
        (with_another_head(neox(), torch.nn.Linear(32, 61, bias=False).half()), "float16, torch.float32"),
    ],
)
def test_weights_that_have_no_place_are_refused_by_name(model, words):
    with pytest.raises(ValueError, match=words):
        from_transformers(model)


def test_a_tied_weight_that_is_nan_is_no_other_weight():
    broken = gpt2()
    with torch.no_grad():
        broken.transformer.wte.weight[0, 0] = torch.nan
    assert from_transformers(broken).lm_head.weight[0, 0].isnan()


def test_other_families_are_refused_by_name():
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32))
    with pytest.raises(ValueError, match="LlamaForCausalLM; give a GPT2LMHeadModel or a GPTNeoXForCausalLM"):
        from_transformers(llama)
