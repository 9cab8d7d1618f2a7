"""Calls behind a cache, with own masks, with several texts in a row: measured right, or refused."""

import math

import numpy as np
import pytest
import torch
from transformers import StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from normfree.entropy import EntropyProbe, UnsupportedModel
from normfree.measures.measurement import measure as measure_windows
from tests.entropy.families import tiny_model
from tests.entropy.test_probe import IDS, LEFT_PADDED, MASK, by_eager_matrices, measure

PACKED = torch.arange(10).repeat(2)[None].expand(2, -1)  # positions of two texts in each row


@pytest.mark.parametrize(
    ("family", "keys"), [("deepseek_v32", "index_topk"), ("glm_moe_dsa", "index_topk"), ("doge", "keep_window_size")]
)
@pytest.mark.parametrize("padded", [False, True])
def test_a_token_that_no_row_picks_is_not_padding(family, keys, padded):
    """Rows of these families see the few keys that an index picks, often not their own."""
    model = tiny_model(family, **{keys: 4})
    mask = LEFT_PADDED if padded else torch.ones_like(LEFT_PADDED)
    heads = measure(model, mask=mask)
    assert heads.rows.unique().tolist() == [int(mask.sum())]
    assert (heads.mean_nats() - by_eager_matrices(model, mask)).abs().max() < 2e-5


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3"])
def test_queries_of_another_dtype_than_keys_are_raised_to_it(family):
    """Latent attention under autocast: a part of the queries or keys is rotated in fp32."""
    model = tiny_model(family)
    with torch.autocast("cpu", torch.bfloat16):
        heads = measure(model, mask=LEFT_PADDED)
    assert heads.nonfinite_rows.sum() == 0
    assert (heads.mean_nats() - by_eager_matrices(model, LEFT_PADDED)).abs().max() < 0.05


def measure_token_by_token(model, cache=None, **options):
    with EntropyProbe(model, **options) as probe, torch.no_grad():
        cache = model(input_ids=IDS[:, :12], past_key_values=cache, use_cache=True).past_key_values
        for position in range(12, 20):
            model(input_ids=IDS[:, position : position + 1], past_key_values=cache)
    return probe.statistics()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generation_with_a_cache_counts_every_row(kind):
    model = tiny_model("llama")

    def cache():
        return StaticCache(config=model.config, max_cache_len=30) if kind == "static" else None

    heads = measure_token_by_token(model, cache())
    torch.testing.assert_close(heads.mean_nats(), measure(model).mean_nats(), atol=1e-6, rtol=0)
    if kind == "static":
        with pytest.raises(ValueError, match="distances are unknown in a static cache"):
            measure_token_by_token(model, cache(), patterns=True)


@pytest.mark.parametrize("family", ["mistral", "llama4_text"])
def test_patterns_are_refused_behind_sliding_and_chunked_caches(family):
    model = tiny_model(family)
    with EntropyProbe(model, patterns=True) as probe, torch.no_grad():
        cache = model(input_ids=IDS[:, :12], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="forgets the first token"):
            model(input_ids=IDS[:, 12:13], past_key_values=cache)
    assert probe.statistics().rows.unique().tolist() == [24]


def test_a_boolean_mask_is_refused_in_eager_attention():
    """Added to the scores, True is 1: nothing is hidden, and the mask does not say what the model did."""
    model = tiny_model("gpt2")
    model.set_attn_implementation("eager")
    mask = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 1, 20, 20)
    with EntropyProbe(model), torch.no_grad(), pytest.raises(UnsupportedModel, match="a boolean one hides nothing"):
        model(input_ids=IDS, attention_mask=mask)


def test_several_texts_in_one_row_are_refused():
    model = tiny_model("llama")
    with EntropyProbe(model), torch.no_grad(), pytest.raises(UnsupportedModel, match="several texts in one row"):
        model(input_ids=IDS, cu_seq_lens_q=torch.tensor([0, 10, 20]))


@pytest.fixture
def toy_flash(monkeypatch):
    """Real flash attention needs a GPU; this function gets the same arguments, and applies the window itself."""

    def flash(module, query, key, value, attention_mask, *, scaling, sliding_window=None, **options):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        query_T1 = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
        behind_TS = query_T1 - torch.arange(key.shape[2])
        seen_TS = (behind_TS >= 0) & (behind_TS < (sliding_window or key.shape[2]))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen_TS, scale=scaling)
        return output.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["toy_flash"] = flash
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "toy_flash", flash_attention_mask)
    yield "toy_flash"
    del ALL_ATTENTION_FUNCTIONS["toy_flash"]


def test_texts_apart_by_position_in_flash_attention_are_refused(toy_flash):
    model = tiny_model("llama")
    model.config._attn_implementation = toy_flash
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=IDS)
        with pytest.raises(UnsupportedModel, match="several texts in one row"):
            model(input_ids=IDS, position_ids=PACKED)
    assert probe.statistics().rows.unique().tolist() == [40]


def test_a_single_flash_query_keeps_its_window(toy_flash):
    model = tiny_model("mistral")
    whole = measure(model)
    model.config._attn_implementation = toy_flash
    heads = measure_token_by_token(model)
    torch.testing.assert_close(heads.mean_nats(), whole.mean_nats(), atol=1e-6, rtol=0)
    torch.testing.assert_close(heads.ceiling_nats(), whole.ceiling_nats(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_patterns_are_refused_for_packed_texts(family):
    model = tiny_model(family, sliding_window=16) if family == "mistral" else tiny_model(family)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(input_ids=IDS, position_ids=PACKED, use_cache=False)
    assert probe.statistics().ceiling_nats()[0] == pytest.approx(math.lgamma(11) / 10)
    with EntropyProbe(model, patterns=True), torch.no_grad(), pytest.raises(ValueError, match="packed into one"):
        model(input_ids=IDS, position_ids=PACKED, use_cache=False)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padding_between_two_turns_is_not_taken_for_packing(family):
    gap = MASK.clone()
    gap[0, 6:14] = 0
    with EntropyProbe(tiny_model(family), patterns=True) as probe, torch.no_grad():
        probe._model(input_ids=IDS, attention_mask=gap)
    assert probe.statistics().rows.unique().tolist() == [32]


def test_compressed_keys_hide_no_padding_and_have_no_distance():
    """deepseek_v4 puts one key for several tokens behind those of the tokens."""
    model = tiny_model("deepseek_v4", num_hidden_layers=4)
    assert measure(model, mask=LEFT_PADDED).rows.unique().tolist() == [34]
    with EntropyProbe(model, patterns=True), torch.no_grad(), pytest.raises(ValueError, match="compressed keys"):
        model(input_ids=IDS, use_cache=False)
    measured = measure_windows(model, IDS)
    assert "distance_tokens" not in measured.values
    assert np.unique(measured["rows"]).tolist() == [40]


def test_calls_in_and_out_of_inference_mode_add_up():
    model = tiny_model("gpt2")
    with EntropyProbe(model) as probe:
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                model(input_ids=IDS)
    assert probe.statistics().rows.unique().tolist() == [160]
