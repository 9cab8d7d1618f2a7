"""The family vision: ViT's logits, patches that all see each other, and saving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from normfree import measure
from normfree.model import NormFreeForImageClassification
from normfree.model.configuration import NormFreeVisionConfig
from normfree.model.conversion import convert
from tests.small_model import CHOICES

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 12, "num_channels": 3}
ELSEWHERE = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "normfree":
            raise ModuleNotFoundError("normfree is not installed here")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
pixels = torch.linspace(-1, 1, 2 * 3 * 12 * 12).view(2, 3, 12, 12)
print(json.dumps({"logits": model(pixels).logits.tolist(), "module": type(model).__module__}))
"""


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 12 * 12).view(2, 3, 12, 12)


def with_noise(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def build(**fields: Any) -> NormFreeForImageClassification:
    torch.manual_seed(0)
    config = NormFreeVisionConfig(**SIZES | fields, num_labels=5)
    return with_noise(NormFreeForImageClassification._from_config(config))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_vit_of_transformers_has_equal_logits(pixels, activation, tmp_path) -> None:
    torch.manual_seed(0)
    names = {number: f"class {number}" for number in range(7)}
    config = ViTConfig(**SIZES, intermediate_size=48, patch_size=4, hidden_act=activation, id2label=names)
    theirs = with_noise(ViTForImageClassification(config))
    ours = convert(theirs)
    torch.testing.assert_close(ours(pixels).logits, theirs(pixels).logits, atol=1e-5, rtol=0)
    assert ours.config.id2label == names
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels).logits, ours(pixels).logits)
    with pytest.raises(ValueError, match="a ViT without biases"):
        convert(ViTForImageClassification(ViTConfig(**SIZES, patch_size=4, qkv_bias=False)))


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
def test_classes_are_read_from_a_token_or_the_mean(pixels, pooling) -> None:
    model = build(pooling=pooling)
    hidden_BTE = model.model(pixels).last_hidden_state
    assert hidden_BTE.shape[1] == model.config.max_position_embeddings == 9 + (pooling == "class_token")
    pooled_BE = hidden_BTE[:, 0] if pooling == "class_token" else hidden_BTE.mean(1)
    assert torch.equal(model(pixels).logits, model.classifier(pooled_BE))


def test_every_patch_sees_every_other(pixels) -> None:
    model = build(num_hidden_layers=1, pooling="mean")
    changed = pixels.clone()
    changed[:, :, -4:, -4:] += 1  # the last patch
    moved_BTE = model.model(changed).last_hidden_state - model.model(pixels).last_hidden_state
    assert (moved_BTE.abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sink", ["none", "softmax_1"])
def test_measured_entropies_are_those_of_the_weights(pixels, attention, sink) -> None:
    model = build(attention_sink=sink)
    model.set_attn_implementation("eager")
    weights = model(pixels, output_attentions=True).attentions
    truth_LH = [-(w.double() * w.double().log()).sum(-1).mean((0, 2)) for w in weights]
    model.set_attn_implementation(attention)
    measured = measure(model, {"pixel_values": pixels}, "heads")
    assert measured["ceiling_nats"] == pytest.approx(torch.tensor(10.0).log().item())
    if sink == "none":
        torch.testing.assert_close(torch.from_numpy(measured["entropy_nats"]), torch.stack(truth_LH), atol=1e-5, rtol=0)
        trained_LH = model.train()(pixels, entropy_layers=(0, 1, 2)).head_entropies
        torch.testing.assert_close(trained_LH.double(), torch.stack(truth_LH), atol=1e-5, rtol=0)


FITTING = [
    {name: "head" if value == "position" else value for name, value in form.items() if value not in ("rotary", "taper")}
    for form in CHOICES
]


@pytest.mark.parametrize("form", FITTING)
def test_every_parameter_of_every_choice_has_a_gradient(pixels, form, tmp_path) -> None:
    model = build(**{name: value for name, value in form.items() if not name.startswith("taper")})
    model(pixels, labels=torch.tensor([0, 4])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": "rotary"}, "position='rotary' is for family='decoder', and this is 'vision'"),
        ({"attention_temperature": "position"}, "attention_temperature='position' is for family='decoder'"),
        ({"norm": "fake", "fake_start_step": 1}, "norm='fake' is for family='decoder'"),
        ({"image_size": 13}, "image_size=13 must be a multiple of patch_size=4"),
        ({"num_channels": 0}, "num_channels=0 must be above 0"),
        ({"pooling": "max"}, r"pooling='max'; allowed: Literal\['class_token', 'mean'\]"),
    ],
)
def test_what_only_decoders_have_is_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        NormFreeVisionConfig(**SIZES | fields)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of 1 x 12 x 12 .*, but the model reads 3 x 12 x 12"):
        build()(torch.zeros(1, 1, 12, 12))


def test_a_saved_classifier_loads_where_normfree_is_missing(pixels, tmp_path) -> None:
    model = build(norm="none")
    model.save_pretrained(tmp_path / "saved")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE, str(tmp_path / "saved")]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout.strip().splitlines()[-1])
    assert answer["module"].startswith("transformers_modules.")
    torch.testing.assert_close(torch.tensor(answer["logits"]), model(pixels).logits)
