"""Our architecture computes what GPT-2 and GPT-NeoX (Pythia) of transformers compute with the same weights."""

# H heads, D head dim

from functools import partial
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from normfree.model import NormFreeForCausalLM
from normfree.model.conversion import convert, fields_of
from tests.small_model import SIZES, with_noise

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
ACTIVATIONS = ("gelu", "gelu_new", "leaky_relu", "linear", "relu")


def gpt2_pair(activation: str = "gelu_new", *, epsilon: float = 1e-5, **fields: Any) -> tuple[Any, NormFreeForCausalLM]:
    config = GPT2Config(**SIZES, activation_function=activation, layer_norm_epsilon=epsilon, **fields)
    torch.manual_seed(7)
    theirs = with_noise(GPT2LMHeadModel(config))
    return theirs, convert(theirs)


def neox_pair(share: float = 0.25, *, parallel: bool = True, base: float = 10000.0, **fields: Any) -> Any:
    fields |= {"rotary_pct": share, "use_parallel_residual": parallel, "rotary_emb_base": base}
    torch.manual_seed(7)
    theirs = with_noise(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=96, **fields)))
    return theirs, convert(theirs)


def assert_parity(theirs: Any, ours: NormFreeForCausalLM) -> None:
    """Equal logits without padding, and with left padding and position ids."""
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


OTHER_FIELDS: dict[str, Any] = {"tie_word_embeddings": False, "n_inner": 50, "attn_implementation": "eager"}
PAIRS: list[Any] = [partial(gpt2_pair, activation) for activation in ACTIVATIONS]
PAIRS += [partial(gpt2_pair, epsilon=1e-2, **OTHER_FIELDS), partial(neox_pair, base=500.0, tie_word_embeddings=True)]
PAIRS += [partial(neox_pair, share, parallel=parallel) for share in (0.25, 0.5, 1.0) for parallel in (True, False)]


@pytest.mark.parametrize("pair", PAIRS)
def test_logits_are_equal(pair) -> None:
    assert_parity(*pair())


@pytest.mark.parametrize("tied", [True, False])
def test_layernorms_with_a_huge_epsilon_are_folded(tied: bool) -> None:
    torch.manual_seed(7)
    theirs = with_noise(GPT2LMHeadModel(GPT2Config(**SIZES, layer_norm_epsilon=1e12, tie_word_embeddings=tied)))
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                weight.mul_(1e6)  # as published: gain times 1e6 / sigma
    ours, ids = convert(theirs), torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(2))
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert (ours.config.norm, ours.config.final_norm) == ("none", "none")
    assert ours.half()(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "gpt2, gpt_neox, vit, t5"),
        ({"model_type": "gpt2", "activation_function": "silu"}, "activation 'silu'"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scales its attention"),
        ({"model_type": "gpt_neox", "attention_bias": False}, "attention without bias"),
    ],
)
def test_other_architectures_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fields_of(config)
