"""Quantiles of token losses against log-softmax in float64 and numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

from normfree import measure

IDS = torch.randint(0, 256, (6, 40), generator=torch.Generator().manual_seed(1))
NAMES = {"loss_median": 0.5, "loss_99_percent": 0.99, "loss_99_9_percent": 0.999, "loss_worst": 1.0}


def losses_of(model: GPT2LMHeadModel, ids: torch.Tensor, **rest: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        logits = model(ids, **rest).logits.double()
    nats = F.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])
    return -nats[..., 0].numpy()


def test_quantiles_are_numpys_of_all_losses(model: GPT2LMHeadModel) -> None:
    losses = losses_of(model.eval(), IDS)
    measured = measure(model, IDS, ["losses", "perplexity"], batch=4)
    for name, share in NAMES.items():
        assert measured[name] == pytest.approx(np.quantile(losses, share), rel=1e-6)
    assert measured["loss"] == pytest.approx(losses.mean(), rel=1e-6)


def test_padding_and_ignored_labels_have_no_loss(model: GPT2LMHeadModel) -> None:
    mask, labels = torch.ones_like(IDS), IDS.clone()
    mask[0, 30:], labels[1, :9] = 0, -100
    losses = losses_of(model.eval(), IDS, attention_mask=mask)
    counted = np.ones_like(losses, dtype=bool)
    counted[0, 29:], counted[1, :8] = False, False
    measured = measure(model, {"input_ids": IDS, "attention_mask": mask, "labels": labels}, "losses")
    assert measured["loss_median"] == pytest.approx(np.median(losses[counted]), rel=1e-6)


def test_accuracy_is_the_share_of_right_predictions(model: GPT2LMHeadModel) -> None:
    with torch.no_grad():
        guesses = model.eval()(IDS).logits[:, :-1].argmax(-1)
    labels = IDS.clone()
    labels[:, 1:14], labels[:, 30:] = guesses[:, :13], -100
    share = (guesses == labels[:, 1:])[:, :29].double().mean().item()
    assert measure(model, {"input_ids": IDS, "labels": labels}, "accuracy")["accuracy"] == pytest.approx(share)
    assert 0.4 < share < 0.6


def test_targets_have_losses_if_they_are_given() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    labels = torch.randint(1, 61, (3, 9))
    labels[0, 5:] = -100
    source = torch.randint(0, 61, (3, 12))
    pair = {"input_ids": source, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
    measured = measure(model, {**pair, "labels": labels}, ["perplexity", "losses"])
    with torch.no_grad():
        loss = model(source, labels=labels).loss.item()
    assert measured["loss"] == pytest.approx(loss, rel=1e-5)
    assert measured["loss_worst"] > loss
    with pytest.raises(ValueError, match="losses need input_ids alone"):
        measure(model, pair, "perplexity")


def test_images_have_losses_if_their_classes_are_given() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, initializer_range=0.5)).eval()
    images, classes = {"pixel_values": torch.rand(3, 3, 16, 16)}, torch.tensor([0, 1, 1])
    with torch.no_grad():
        logits = model(**images).logits.double()
    measured = measure(model, {**images, "labels": classes}, ["perplexity", "accuracy", "losses"])
    assert measured["loss"] == pytest.approx(F.cross_entropy(logits, classes).item(), rel=1e-6)
    assert measured["accuracy"] == pytest.approx((logits.argmax(-1) == classes).double().mean().item())
    assert measured["loss_worst"] == pytest.approx(F.cross_entropy(logits, classes, reduction="none").max().item())
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    assert np.isnan(measure(model, {**images, "labels": classes}, "accuracy")["accuracy"])
    with pytest.raises(ValueError, match="losses of images need their classes as `labels`"):
        measure(model, images, "accuracy")
