"""User-defined attention functions, and models that see later tokens: rows follow the mask, or are refused."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from normfree.entropy import EntropyProbe, UnsupportedModel
from tests.entropy.families import tiny_model
from tests.entropy.test_probe import IDS, LEFT_PADDED, MASK, measure

MASKS = AttentionMaskInterface._global_mapping  # what AttentionMaskInterface.register writes to
EVERY_KEY_IS_SEEN = torch.ones(2, 1, 20, 20, dtype=torch.bool)


def always_written_out(**options):
    return sdpa_mask(**options | {"allow_is_causal_skip": False})


@pytest.fixture
def mine():
    """A function of the user's own, whose softmax is kept: (B, H, T, S) of every call."""
    weights = []

    def attend(module, query, key, value, attention_mask, *, scaling, **_):
        groups = query.shape[1] // key.shape[1]
        scores = query.double() @ key.double().repeat_interleave(groups, 1).mT * scaling
        if attention_mask is None and MASKS.get("mine") is sdpa_mask:
            attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attention_mask is not None:
            if attention_mask.dtype != torch.bool:
                attention_mask = attention_mask == 0
            scores = scores.masked_fill(~attention_mask, -torch.inf)
        weights.append(scores.softmax(-1).nan_to_num())
        output = weights[-1].to(value.dtype) @ value.repeat_interleave(groups, 1)
        return output.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["mine"] = attend
    yield weights
    del ALL_ATTENTION_FUNCTIONS["mine"]
    MASKS.pop("mine", None)


def mean_and_ceiling(weights, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, H) and (L,), over the rows of real tokens."""
    p_LBHTS = torch.stack(weights)
    real_B1T = mask.bool()[:, None]
    nats_LBHT = torch.special.entr(p_LBHTS).sum(-1) * real_B1T
    ceiling_LBHT = (p_LBHTS > 0).sum(-1).clamp(min=1).log() * real_B1T
    rows = mask.sum()
    return nats_LBHT.sum((1, 3)) / rows, ceiling_LBHT.sum((1, 3)).mean(-1).double() / rows


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("mask", [MASK, LEFT_PADDED, LEFT_PADDED.flip(1)], ids=["whole", "left", "right"])
@pytest.mark.parametrize("masks", [sdpa_mask, eager_mask, always_written_out])
def test_an_own_function_is_measured_as_its_masks_say(mine, family, mask, masks):
    MASKS["mine"] = masks
    model = tiny_model(family)
    model.config._attn_implementation = "mine"
    heads = measure(model, mask=mask)
    mean, ceiling = mean_and_ceiling(mine, mask)
    torch.testing.assert_close(heads.mean_nats(), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(heads.ceiling_nats(), ceiling, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("masks", [None, lambda **options: None])
def test_an_own_function_that_no_mask_reaches_is_refused(mine, family, masks):
    if masks is not None:
        MASKS["mine"] = masks
    model = tiny_model(family)
    model.config._attn_implementation = "mine"
    for mask in (MASK, LEFT_PADDED):
        with pytest.raises(UnsupportedModel, match=r"'mine' hides; call .*register\('mine', eager_mask"):
            measure(model, mask=mask)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=IDS, attention_mask=EVERY_KEY_IS_SEEN)
    mean, ceiling = mean_and_ceiling(mine[-2:], MASK)
    torch.testing.assert_close(probe.statistics().mean_nats(), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(probe.statistics().ceiling_nats(), ceiling, atol=1e-6, rtol=0)


def sees_later_tokens(family: str, implementation: str):
    model = tiny_model(family, attn_implementation=implementation)
    if family == "bert":
        model.config.is_decoder = False
    model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model


@pytest.mark.parametrize("family", ["bert", "llama", "mistral", "gpt2", "qwen3"])
@pytest.mark.parametrize(("method", "implementation"), [("auto", "eager"), ("auto", "sdpa"), ("eager", "eager")])
@pytest.mark.parametrize("mask", [MASK, LEFT_PADDED, LEFT_PADDED.flip(1)], ids=["whole", "left", "right"])
def test_models_that_see_later_tokens_have_their_own_ceiling(family, implementation, method, mask):
    model = sees_later_tokens(family, implementation)
    heads = measure(model, mask=mask, method=method)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = [p.double() for p in model(input_ids=IDS, attention_mask=mask, output_attentions=True).attentions]
    mean, ceiling = mean_and_ceiling(weights, mask)
    torch.testing.assert_close(heads.mean_nats(), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(heads.ceiling_nats(), ceiling, atol=1e-6, rtol=0)
