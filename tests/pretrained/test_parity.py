"""Our architecture computes what GPT-2 and GPT-NeoX (Pythia) of transformers compute with the same weights."""

# H heads, D head dim

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from normfree.model import NormFreeConfig, NormFreeForCausalLM

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64}
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "leaky_relu": "leaky_relu",
    "linear": "identity",
    "relu": "relu",
}
# Parts of transformers' names of modules -> ours, in both families.
NAMES = {
    r"^(transformer|gpt_neox)\.": "model.",
    r"\.h\.": ".layers.",
    r"wte|embed_in": "embed_tokens",
    r"wpe": "positions.vectors",
    r"ln_1|input_layernorm": "attention_norm",
    r"ln_2|post_attention_layernorm": "feed_forward_norm",
    r"ln_f|final_layer_norm": "final_norm",
    r"attn\.c_attn|attention\.query_key_value": "attention.qkv",
    r"attn\.c_proj|attention\.dense": "attention.output",
    r"mlp\.(c_fc|dense_h_to_4h)": "feed_forward.input",
    r"mlp\.(c_proj|dense_4h_to_h)": "feed_forward.output",
}


def randomised(model: Any) -> Any:
    """Every weight far from its start, so that a swapped bias or norm shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = "norm" in name.lower() or ".ln_" in name
            parameter.copy_(1 + 0.3 * noise if around_one and parameter.ndim == 1 else 0.2 * noise)
    return model.eval()


def ours_like(theirs: Any, **fields: Any) -> NormFreeForCausalLM:
    """A normfree model with the weights of a GPT-2 or GPT-NeoX."""
    config = NormFreeConfig(**SIZES, **fields, bias="all", tie_word_embeddings=theirs.config.tie_word_embeddings)
    ours = NormFreeForCausalLM._from_config(config, attn_implementation=theirs.config._attn_implementation)
    ours.load_state_dict({our_name(name): our_layout(name, weight) for name, weight in theirs.state_dict().items()})
    return ours.eval()


def our_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = re.sub(theirs, ours, name)
    return name


def our_layout(name: str, weight: Tensor) -> Tensor:
    if ".c_" in name:
        return weight.t()  # GPT-2 stores (input, output); a bias stays as it is
    if "query_key_value" in name:  # rows from (H, 3, D), by head, to (3, H, D): all queries first
        return weight.unflatten(0, (4, 3, -1)).transpose(0, 1).flatten(0, 2)
    return weight


def gpt2_pair(activation: str = "gelu_new", *, epsilon: float = 1e-5, **fields: Any) -> tuple[Any, NormFreeForCausalLM]:
    config = GPT2Config(**SIZES, activation_function=activation, layer_norm_epsilon=epsilon, **fields)
    theirs = randomised(GPT2LMHeadModel(config))
    inner = fields.get("n_inner")
    return theirs, ours_like(theirs, activation=ACTIVATIONS[activation], norm_epsilon=epsilon, intermediate_size=inner)


def neox_pair(share: float = 0.25, *, parallel: bool = True, base: float = 10000.0, **fields: Any) -> Any:
    fields |= {"rotary_pct": share, "use_parallel_residual": parallel, "rotary_emb_base": base}
    theirs = randomised(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=96, **fields)))
    positions = {"position": "rotary", "rotary_share": share, "rotary_base": base}
    residual = "parallel" if parallel else "sequential"
    return theirs, ours_like(theirs, residual=residual, intermediate_size=96, norm_epsilon=1e-5, **positions)


def assert_parity(theirs: Any, ours: NormFreeForCausalLM) -> None:
    """Equal logits without padding, with left padding and position ids, and token by token with a cache."""
    ids = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, plain, **TOLERANCE)
        padded = theirs(ids, attention_mask=mask, position_ids=positions).logits
        logits = ours(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(logits[mask.bool()], padded[mask.bool()], **TOLERANCE)
        assert not torch.allclose(logits[0, -1], plain[0, -1], **TOLERANCE)
        cache, steps = None, []
        for step in range(ids.shape[1]):
            output = ours(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), plain, **TOLERANCE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gpt2_logits_are_equal(activation: str) -> None:
    assert_parity(*gpt2_pair(activation))


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("parallel", [True, False])
def test_neox_logits_are_equal(share: float, parallel: bool) -> None:
    assert_parity(*neox_pair(share, parallel=parallel))


def test_other_fields_are_equal() -> None:
    assert_parity(*neox_pair(base=500.0, tie_word_embeddings=True))
    assert_parity(*gpt2_pair(epsilon=1e-2, tie_word_embeddings=False, n_inner=50, attn_implementation="eager"))
