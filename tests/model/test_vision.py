"""The family vision: ViT's logits, patches that all see each other, and saving."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from normfree import measure
from normfree.model.conversion import convert
from tests.elsewhere import check_loading_elsewhere
from tests.small_model import CHOICES, SMALL, family_model, with_noise

IMAGES = {"image_size": 12, "num_channels": 3, "patch_size": 4}
PIXELS = torch.linspace(-1, 1, 2 * 3 * 12 * 12).view(2, 3, 12, 12)


build = partial(family_model, "vision", **IMAGES, num_labels=5)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_vit_of_transformers_has_equal_logits(activation: str) -> None:
    config = ViTConfig(**SMALL, **IMAGES, intermediate_size=48, hidden_act=activation, id2label={0: "a", 1: "b"})
    theirs = with_noise(ViTForImageClassification(config))
    ours = convert(theirs)
    torch.testing.assert_close(ours(PIXELS).logits, theirs(PIXELS).logits, atol=1e-5, rtol=0)
    assert ours.config.id2label == config.id2label


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
def test_classes_are_read_from_a_token_or_the_mean(pooling: str) -> None:
    model = build(pooling=pooling)
    hidden_BTE = model.model(PIXELS).last_hidden_state
    assert hidden_BTE.shape[1] == model.config.max_position_embeddings == 9 + (pooling == "class_token")
    pooled_BE = hidden_BTE[:, 0] if pooling == "class_token" else hidden_BTE.mean(1)
    assert torch.equal(model(PIXELS).logits, model.classifier(pooled_BE))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_entropies_are_those_of_weights_on_all_patches(attention: str) -> None:
    model = build()
    model.set_attn_implementation("eager")
    weights_LBHTT = torch.stack(model(PIXELS, output_attentions=True).attentions).double()
    assert (weights_LBHTT > 0).all()
    truth_LH = -(weights_LBHTT * weights_LBHTT.log()).sum(-1).mean((1, 3))
    model.set_attn_implementation(attention)
    measured = measure(model, {"pixel_values": PIXELS}, "heads")
    assert measured["ceiling_nats"] == pytest.approx(torch.tensor(10.0).log().item())
    trained_LH = model.train()(PIXELS, entropy_layers=(0, 1, 2)).head_entropies
    for entropies_LH in (torch.from_numpy(measured["entropy_nats"]), trained_LH.double()):
        torch.testing.assert_close(entropies_LH, truth_LH, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", CHOICES)
def test_every_parameter_of_every_choice_has_a_gradient(form, tmp_path) -> None:
    decoders = ("rotary", "position", "taper", 8)  # what is refused below
    model = build(**{name: value for name, value in form.items() if value not in decoders})
    model(PIXELS, labels=torch.tensor([0, 4])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(PIXELS).logits, model(PIXELS).logits)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of 3 x 12 x 12 .*, but the model reads 3 x 8 x 8"):
        build(image_size=8)(PIXELS)


@pytest.mark.slow
def test_a_saved_classifier_loads_where_normfree_is_missing(tmp_path) -> None:
    check_loading_elsewhere(build(norm="none"), "AutoModelForImageClassification", {"pixel_values": PIXELS}, tmp_path)
