"""Measured beside the usual functions: matrices by method='eager', functions of the user's own; and refusals."""

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from normfree.entropy import EntropyProbe, UnsupportedModel
from tests.entropy.families import tiny_model
from tests.entropy.kinds import matrices_of
from tests.entropy.test_probe import IDS, LEFT_PADDED, MASK, by_eager_matrices, measure

HYBRID = {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4}
ZAMBA = {"num_key_value_heads": 4, "n_mamba_heads": 4}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
WITHOUT_LAYER_NUMBERS = {
    "git": {"vision_config": VISION | {"image_size": 16, "patch_size": 8}},
    "zamba": HYBRID | ZAMBA | {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2},
    "zamba2": HYBRID | ZAMBA,
}


def eager(family: str, **own):
    return tiny_model(family, attn_implementation="eager", **own)


@pytest.mark.parametrize("family", WITHOUT_LAYER_NUMBERS)
def test_modules_without_layer_numbers_are_served_by_matrices(family):
    model = eager(family, **WITHOUT_LAYER_NUMBERS[family])
    with pytest.raises(UnsupportedModel, match="pass method='eager'"):
        EntropyProbe(model)
    heads = measure(model, mask=LEFT_PADDED, method="eager")
    assert heads.layers == ([0, 1] if family == "git" else [1, 3])
    assert (heads.mean_nats() - by_eager_matrices(model, LEFT_PADDED)).abs().max() < 2e-5


KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
HYBRIDS = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "minimax": {"layer_types": KINDS},
}


@pytest.mark.parametrize("method", ["auto", "eager"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrid_layers_keep_their_numbers_and_states_are_no_attention(family, method):
    heads = measure(eager(family, num_hidden_layers=4, **HYBRIDS[family]), method=method)
    assert heads.layers == [1, 3]
    assert heads.rows.unique().tolist() == [40]


@pytest.mark.parametrize(("method", "implementation"), [("auto", "eager"), ("auto", "sdpa"), ("eager", "eager")])
def test_differential_attention_has_one_row_a_query_and_head(method, implementation):
    model = tiny_model("diffllama", attn_implementation=implementation)
    heads = measure(model, mask=LEFT_PADDED, method=method)
    assert heads.rows.unique().tolist() == [34]
    assert (heads.mean_nats() - by_eager_matrices(model, LEFT_PADDED)).abs().max() < 2e-5


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj", "codegen", "gpt_neo", "xglm", "openai-gpt", "mpt"])
@pytest.mark.parametrize("mask", [MASK, LEFT_PADDED, LEFT_PADDED.flip(1)], ids=["whole", "left", "right"])
def test_rounding_in_sharp_heads_does_not_lower_the_ceiling(family, mask):
    own = {"gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6}}
    own |= {name: {"rotary_dim": 4} for name in ("gptj", "codegen")}
    model = eager(family, **own.get(family, {}))
    ordinary = measure(model, mask=mask, method="eager").ceiling_nats()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("query", "q_proj", "k_proj", "qkv", "Wqkv", "c_attn")):
                parameter.mul_(30)
    sharp = measure(model, mask=mask, method="eager")
    assert sharp.mean_nats().mean() < 0.3
    torch.testing.assert_close(sharp.ceiling_nats(), ordinary, atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["mamba", "blt", "cpmant", "reformer"])
@pytest.mark.parametrize("method", ["auto", "eager"])
def test_what_neither_way_reads_is_refused_with_the_reason(family, method):
    model = tiny_model("bloom")
    model.config.model_type = family
    with pytest.raises(UnsupportedModel, match=rf"{family} .*, so it is not measured; choose another model"):
        EntropyProbe(model, method=method)


def test_only_whole_matrices_in_full_precision_are_measured():
    heads = measure(eager("big_bird", attention_type="original_full"), method="eager")
    assert heads.mean_nats().isfinite().all()
    with pytest.raises(UnsupportedModel, match="load big_bird with attention_type='original_full'"):
        EntropyProbe(eager("big_bird", attention_type="block_sparse"), method="eager")
    with pytest.raises(UnsupportedModel, match="fp16 rounds small probabilities to 0"):
        measure(eager("bloom").half(), method="eager")


def test_padding_masks_must_be_batch_by_tokens():
    model = eager("falcon")
    assert measure(model, mask=LEFT_PADDED, method="eager").rows.unique().tolist() == [34]
    causal_B1TT = MASK.bool()[:, None, None] & torch.ones(20, 20, dtype=torch.bool).tril()
    with pytest.raises(UnsupportedModel, match=r"\(2, 1, 20, 20\); method='eager' needs \(batch, tokens\)"):
        measure(model, mask=causal_B1TT, method="eager")
    for family in ("falcon", "bloom"):
        with pytest.raises(UnsupportedModel, match="static cache"), EntropyProbe(eager(family), "eager") as probe:
            probe._model.generate(IDS, attention_mask=LEFT_PADDED, max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("family", ["falcon", "mistral"])
def test_generation_counts_the_rows_that_are_no_padding(family):
    """mistral's window of 6 forgets: the mask that generate makes is then longer than the keys."""
    model = eager(family)
    with EntropyProbe(model, "eager") as probe, torch.no_grad():
        model.generate(IDS, attention_mask=LEFT_PADDED, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert probe.statistics().rows.unique().tolist() == [34 + 2 * 3]


def test_an_image_before_the_text_is_no_padding():
    model = eager("git", **WITHOUT_LAYER_NUMBERS["git"])
    pixels = torch.rand(2, 3, 16, 16)
    with EntropyProbe(model, "eager") as probe, torch.no_grad():
        seen = model(input_ids=IDS, attention_mask=LEFT_PADDED, pixel_values=pixels, output_attentions=True)
    queries = seen.attentions[0].shape[2]
    assert queries > 20
    assert probe.statistics().rows.unique().tolist() == [2 * queries - 6]


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


@pytest.mark.parametrize("family", ["bert", "llama", "mistral", "gpt2", "qwen3"])
@pytest.mark.parametrize(("method", "implementation"), [("auto", "eager"), ("auto", "sdpa"), ("eager", "eager")])
@pytest.mark.parametrize("mask", [MASK, LEFT_PADDED, LEFT_PADDED.flip(1)], ids=["whole", "left", "right"])
def test_models_that_see_later_tokens_have_their_own_ceiling(family, implementation, method, mask):
    model = tiny_model(family, attn_implementation=implementation, is_decoder=False, is_causal=False)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    heads = measure(model, mask=mask, method=method)
    weights = [*matrices_of(model, {"input_ids": IDS, "attention_mask": mask}).values()]
    mean, ceiling = mean_and_ceiling(weights, mask)
    torch.testing.assert_close(heads.mean_nats(), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(heads.ceiling_nats(), ceiling, atol=1e-6, rtol=0)
