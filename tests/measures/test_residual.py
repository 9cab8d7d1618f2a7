"""Measures of logits, the residual stream and propagation against what models and numpy's T x T matrices say."""

# T tokens, N all tokens, E hidden size, L layers

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from normfree import measure
from tests.entropy.families import tiny_model
from tests.measures.families import inputs_of, kind_of, random_model
from tests.small_model import small_model

IDS = torch.arange(48).view(4, 12) % 20


@pytest.mark.parametrize("batch", [4, 1])
def test_the_largest_logit_is_that_of_the_written_out_scores(batch: int) -> None:
    """GPT-2's own projections, in float64, scored against each other under a causal mask."""
    model = tiny_model("gpt2")
    measured = measure(model, IDS, "logits", batch=batch)
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    for layer, block in enumerate(model.transformer.h):
        q, k, _ = block.attn.c_attn(block.ln_1(hidden[layer])).double().chunk(3, dim=-1)
        heads = model.config.n_head
        q, k = (value.unflatten(-1, (heads, -1)).transpose(1, 2) for value in (q, k))
        scores_BHTT = q @ k.mT / q.shape[-1] ** 0.5
        scores_BHTT.masked_fill_(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
        assert measured["max_logit"][layer] == pytest.approx(scores_BHTT.amax((0, 2, 3)).tolist(), rel=1e-5)


def streams(family: str) -> tuple[Any, dict[str, Tensor], list[np.ndarray]]:
    """A model, its inputs, and what enters its blocks as it says itself: (N, E) float64 each."""
    model = small_model(position="rotary") if family == "normfree" else random_model(family)
    inputs = {"input_ids": IDS} if family == "normfree" else inputs_of(model, kind_of(family))
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    stacks = [output.hidden_states] if "hidden_states" in output else None
    stacks = stacks or [output.encoder_hidden_states, output.decoder_hidden_states]
    entering = [states for stack in stacks for states in stack[:-1]]  # the last is behind the blocks
    return model, inputs, [states.flatten(0, 1).double().numpy() for states in entering]


@pytest.mark.parametrize("family", ["normfree", "gpt2", "llama", "bert", "vit", "t5"])
def test_the_stream_is_that_of_the_models_own_hidden_states(family: str) -> None:
    model, inputs, entering = streams(family)
    measured = measure(model, inputs, "residual")
    for layer, stream_NE in enumerate(entering):
        sizes_NE, squares_E = np.abs(stream_NE), np.square(stream_NE).mean(0)
        median = np.median(sizes_NE)
        of_tokens_N = sizes_NE.max(1) / np.median(sizes_NE, 1)
        values = {name: values_L[layer] for name, values_L in measured.values.items()}
        assert values["residual_rms"] == pytest.approx(np.sqrt(squares_E.mean()), rel=1e-6)
        kurtosis = 1 + np.var(squares_E) / np.mean(squares_E) ** 2
        assert values["feature_size_kurtosis"] == pytest.approx(kurtosis, rel=1e-6)
        assert values["largest_activation"] == pytest.approx(sizes_NE.max(), rel=1e-6)
        assert values["median_activation"] == pytest.approx(median, rel=0.02)  # few values: the two middles differ
        assert values["largest_to_median"] == values["largest_activation"] / values["median_activation"]
        assert values["largest_to_median_of_token"] == pytest.approx(of_tokens_N.mean(), rel=1e-6)


def test_what_branches_add_is_recomputed_from_their_inputs() -> None:
    model = random_model("gpt2")
    measured = measure(model, IDS, "residual", batch=3)
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
        for layer, block in enumerate(model.transformer.h):
            attended = block.attn(block.ln_1(hidden[layer]))[0]
            fed = block.mlp(block.ln_2(hidden[layer] + attended))
            for part, added in (("attention", attended), ("feed_forward", fed)):
                rms = added.double().square().mean().sqrt().item()
                assert measured[f"{part}_rms"][layer] == pytest.approx(rms, rel=1e-5)
                ratio = rms / measured["residual_rms"][layer]
                assert measured[f"{part}_to_stream"][layer] == pytest.approx(ratio, rel=1e-5)


def test_a_learned_scale_is_a_part_of_what_is_added() -> None:
    """ReZero's scale is 0 at the start: the branches add nothing, whatever they compute."""
    measured = measure(small_model(branch="rezero", spread=0.0), IDS, "residual")
    assert not measured["attention_rms"].any()
    assert not measured["feed_forward_to_stream"].any()


def test_planted_massive_activations_are_counted() -> None:
    """Every third token has a 300 and a 3,000, in two features, before the first block; all else is 1 or -1."""
    model: Any = random_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.copy_(torch.randn_like(model.transformer.wte.weight).sign())
        model.transformer.wte.weight[::3, 5], model.transformer.wte.weight[::3, 9] = 300.0, -3000.0
    measured = measure(model, torch.arange(48).view(4, 12), "residual")
    assert measured["activations_over_100_medians"][0] == 2 * 16
    assert measured["activations_over_1000_medians"][0] == 16
    assert measured["largest_activation"][0] == 3000
    assert measured["largest_to_median"][0] == pytest.approx(3000, rel=0.004)
    assert measured["largest_to_median_of_token"][0] == pytest.approx((3000 + 2 * 1) / 3, rel=1e-6)
    width = 32
    others, planted = [1.0] * (width - 2), [(2 + 300**2) / 3, (2 + 3000**2) / 3]
    squares = np.array([*others, *planted])
    assert measured["feature_size_kurtosis"][0] == pytest.approx(np.mean(squares**2) / np.mean(squares) ** 2, rel=1e-6)


def test_every_patch_counts_beside_padded_text() -> None:
    sizes = {"intermediate_size": 48, "num_attention_heads": 4}
    text_config = {"hidden_size": 32, "num_hidden_layers": 2, **sizes}
    vision_config = {"hidden_size": 24, "num_hidden_layers": 3, "image_size": 16, "patch_size": 4, **sizes}
    config = CLIPConfig(text_config=text_config, vision_config=vision_config)
    model = CLIPModel(config).eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    images = torch.randn(2, 3, 16, 16)
    measured = measure(model, {"input_ids": IDS[:2], "attention_mask": mask, "pixel_values": images}, "residual")
    assert measured.layers["residual_rms"] == ["text 0", "text 1", "vision 0", "vision 1", "vision 2"]
    with torch.no_grad():
        text, vision = model.text_model, model.vision_model
        words = text(IDS[:2], attention_mask=mask, output_hidden_states=True).hidden_states[1]
        patches = vision(images, output_hidden_states=True).hidden_states[1]
    for layer, states in ((1, words[mask != 0]), (3, patches)):
        assert measured["residual_rms"][layer] == pytest.approx(states.double().square().mean().sqrt().item(), rel=1e-6)


def test_branches_of_experts_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    measured = measure(tiny_model("mixtral"), IDS, "residual")
    assert "residual_rms" in measured.values
    assert "attention_rms" not in measured.values
    assert "is a mixture of experts" in caplog.text


def off_diagonal_mean(matrix: np.ndarray) -> float:
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


@pytest.mark.parametrize("family", ["normfree", "gpt2", "llama"])
@pytest.mark.parametrize("batch", [4, 3])
def test_values_are_those_of_the_written_out_matrices(family: str, batch: int) -> None:
    model = small_model() if family == "normfree" else tiny_model(family)
    measured = measure(model, IDS, "propagation", batch=batch)
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states[:-1]
    for layer, stream_BTE in enumerate(states.double().numpy() for states in hidden):
        stream_NE = stream_BTE.reshape(-1, stream_BTE.shape[-1])
        directions_BTE = stream_BTE / np.linalg.norm(stream_BTE, axis=-1, keepdims=True)
        cosines = [off_diagonal_mean(each_TE @ each_TE.T) for each_TE in directions_BTE]
        products = [off_diagonal_mean(stream_TE @ stream_TE.T) for stream_TE in stream_BTE]
        residuals = [np.linalg.norm(each - each.mean(0)) / np.linalg.norm(each) for each in stream_BTE]
        shares = np.linalg.svd(stream_NE, compute_uv=False)
        shares /= shares.sum()
        values = {name: values_L[layer] for name, values_L in measured.values.items()}
        assert values["token_cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
        square = np.square(stream_NE).sum(1).mean()
        assert values["token_correlation"] == pytest.approx(np.mean(products) / square, abs=1e-6)
        assert values["rank_collapse_residual"] == pytest.approx(np.mean(residuals), abs=1e-6)
        assert values["effective_rank"] == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-6)


def test_equal_tokens_have_collapsed() -> None:
    """Without positions and with one token repeated, all rows are one vector."""
    model = small_model(position="rotary")
    measured = measure(model, torch.full((2, 12), 7), "propagation")
    assert measured["token_cosine"] == pytest.approx([1] * 3, abs=1e-6)
    assert measured["token_correlation"] == pytest.approx([1] * 3, abs=1e-6)
    assert measured["rank_collapse_residual"] == pytest.approx([0] * 3, abs=1e-6)
    assert measured["effective_rank"] == pytest.approx([1] * 3, abs=1e-4)  # float32's rounding differs by token
