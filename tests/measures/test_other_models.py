"""Measures of models whose stream, norms or inputs differ from a GPT-2's: images beside text, sound, low-rank maps."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    RobertaConfig,
    RobertaForCausalLM,
)

from normfree import intervene, measure
from normfree.entropy.support import UnsupportedModel
from tests.entropy.families import tiny_model
from tests.entropy.kinds import IDS, PADDED, PADDED_TARGETS, TARGETS, inputs_of, matrices_of, tiny_kind
from tests.measures.families import recorded

TEXT: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IMAGE = 90  # the id in place of each patch


def test_losses_of_text_beside_an_image_are_the_models_own() -> None:
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4, "projection_dim": 32}
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config={"model_type": "llama"} | TEXT, image_token_id=IMAGE)
    ids = torch.tensor([[5, *[IMAGE] * 16, 6, 7, 8], [4, *[IMAGE] * 16, 9, 3, 2]])
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16), "attention_mask": mask}
    model = LlavaForConditionalGeneration(config).eval()
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    with torch.no_grad():
        own = model(**inputs, labels=labels).loss.item()
    assert measure(model, inputs | {"labels": labels}, "perplexity")["loss"] == pytest.approx(own, rel=1e-6)
    assert measure(model, inputs, "perplexity")["loss"] != pytest.approx(own, rel=1e-3)  # of the patches' ids too


def test_patches_of_all_images_in_one_row_are_read() -> None:
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    tokens = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rotary}, vision_config=vision, **tokens)
    ).eval()
    ids = torch.tensor([[5, 92, *[IMAGE] * 4, 93, 6, 7]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    block = model.model.visual.blocks[0]
    stream = recorded(model, inputs, before=[block])[block]
    measured = measure(model, inputs, ["residual", "propagation"])
    assert measured["residual_rms"][0] == pytest.approx(np.sqrt(np.square(stream).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("residual", "xlnet", "its stream has tokens first"),
        ("residual", "longformer", "it adds padding of its own"),
        ("residual", "mobilevit", "its stream has channels first"),
        ("units", "falcon_h1", "scales its features before the nonlinearity"),
        ("selectivity", "vit", "ViTModel has no vocabulary"),
    ],
)
def test_models_that_cannot_be_read_are_refused(name: str, kind: str, message: str) -> None:
    own = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8} if kind == "falcon_h1" else {}
    with pytest.raises(ValueError, match=message):
        measure(tiny_kind(kind, **own), {}, name, tokenizer=object())


@pytest.mark.parametrize("kind", ["bitnet", "youtu"])
def test_norms_of_what_a_map_wrote_are_left_out(kind: str) -> None:
    """Low-rank queries and keys, and the norms of BitNet in front of its output maps."""
    model = tiny_model(kind)
    norms = {"attention": "input_layernorm", "feed_forward": "post_attention_layernorm"}
    measured = measure(model, IDS, "ranges")
    for site, name in norms.items():
        modules = [getattr(layer, name) for layer in model.model.layers]
        values = recorded(model, {"input_ids": IDS}, before=modules)
        for end in ("min", "max"):
            expected = [getattr(values[module], end)() for module in modules]
            np.testing.assert_allclose(measured[f"{site}_norm_input_{end}"], expected, rtol=1e-5)


def test_the_norm_of_a_head_is_no_final_norm() -> None:
    torch.manual_seed(0)
    model = RobertaForCausalLM(RobertaConfig(**TEXT, is_decoder=True)).eval()
    for inputs in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}):
        assert not [name for name in measure(model, inputs, "ranges").values if name.startswith("final_norm")]


def test_values_of_an_additive_mask_count_beside_a_bias() -> None:
    encoder = tiny_kind("t5").encoder
    inputs = {"input_ids": IDS, "attention_mask": 3 * torch.randn(2, 1, 20, 20)}
    expected = [torch.special.entr(p_BHTS).sum(-1).mean((0, 2)) for p_BHTS in matrices_of(encoder, inputs).values()]
    np.testing.assert_allclose(measure(encoder, inputs)["entropy_nats"], torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_tokens_of_encoder_and_decoder_have_classes_of_their_own(kind: str) -> None:
    model = tiny_kind(kind)
    options = {"selectivity": {"classes": torch.arange(model.config.vocab_size) % 3}}
    first = {"input_ids": IDS[:1, 6:], "decoder_input_ids": TARGETS[:1]}
    alone = measure(model, first, "selectivity", **options)
    masks = {"attention_mask": PADDED[:1], "decoder_attention_mask": PADDED_TARGETS[:1]}
    padded = measure(model, {"input_ids": IDS[:1], "decoder_input_ids": TARGETS[:1]} | masks, "selectivity", **options)
    assert np.isfinite(alone["selectivity_index"]).all()
    if kind == "t5":  # BART numbers its positions from the padding on
        np.testing.assert_allclose(padded["selectivity_index"], alone["selectivity_index"], rtol=1e-4)


def test_a_mask_of_frames_is_not_that_of_tokens() -> None:
    model = tiny_kind("whisper")
    inputs = inputs_of(model) | {"decoder_input_ids": TARGETS}
    plain = measure(model, inputs, ["residual", "units"])
    masked = measure(model, inputs | {"attention_mask": torch.ones(2, 16)}, ["residual", "units"])
    np.testing.assert_array_equal(masked["residual_rms"], plain["residual_rms"])


def test_padding_alone_has_no_ranges() -> None:
    model = tiny_model("gpt2")
    measured = measure(model, {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}, "ranges")
    assert np.isnan(measured["softmax_input_max"]).all()


def test_a_token_of_length_zero_has_no_direction() -> None:
    """As the class token of a new BEiT."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[50] = 0
        model.transformer.wpe.weight[0] = 0
    ids = torch.cat([torch.full((2, 1), 50), IDS % 50], dim=1)
    block = model.transformer.h[0]
    stream_NE = recorded(model, {"input_ids": ids}, before=[block])[block]
    stream_BTE = stream_NE.reshape(2, 21, -1)[:, 1:].astype(np.float64)
    sizes = abs(stream_BTE)
    directions = stream_BTE / np.linalg.norm(stream_BTE, axis=-1, keepdims=True)
    cosines = directions @ directions.swapaxes(1, 2)
    measured = measure(model, ids, ["propagation", "residual"])
    expected = (cosines.sum() - np.trace(cosines, axis1=1, axis2=2).sum()) / (2 * 20 * 19)
    assert measured["token_cosine"][0] == pytest.approx(expected, rel=1e-5)
    ratios = sizes.max(-1) / np.median(sizes, axis=-1)
    assert measured["largest_to_median_of_token"][0] == pytest.approx(ratios.mean(), rel=1e-5)


def test_heads_that_the_model_runs_past_are_named() -> None:
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, reorder_and_upcast_attn=True)
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    with pytest.raises(UnsupportedModel, match="layer 1 was not changed"), intervene(model, [(1, 2)], "zero"):
        model(IDS)
    with intervene(model, [(1, 2)], "zero"):
        pass  # no pass, so nothing to say
