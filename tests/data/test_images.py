"""Images as corpora: what a model reads of them, what is held out, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data import Corpus, ImageCorpus, prepare, prepared
from normfree.model import HEADS
from normfree.model.configuration import NormFreeVisionConfig
from normfree.pretrained.inputs import read_images
from normfree.spec.compose import compose_run
from normfree.spec.run import DataSpec
from tests.images import SIZE, draw_digits, write_digits, write_idx


def prepare_folder(folder: Path, cache: Path, **fields: Any) -> Corpus:
    return prepare(DataSpec(source="images", paths=(str(folder),), **fields), cache=cache, progress=False)


def pixels_of(corpus: Corpus) -> dict[str, torch.Tensor]:
    config = NormFreeVisionConfig(image_size=SIZE, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    return HEADS["vision"](config).batch_of(torch.from_numpy(corpus.held_out_ids()))


def test_a_model_reads_what_its_processor_makes_of_files(tmp_path: Path) -> None:
    corpus = prepare_folder(write_digits(tmp_path / "digits", 60), tmp_path / "cache")
    batch = pixels_of(corpus)
    files = read_images(tmp_path / "digits", corpus.processor(), 60, channels=1)["pixel_values"]
    labels = [int(path.parent.name) for path in sorted((tmp_path / "digits").rglob("*.png"))]
    for image, label in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True):
        distances = (files - image).abs().amax((1, 2, 3))
        assert distances.min() < 1e-6
        assert labels[distances.argmin()] == label


def test_every_twentieth_image_is_held_out_wherever_it_lies(tmp_path: Path) -> None:
    corpus = prepare_folder(write_digits(tmp_path / "digits", 60), tmp_path / "cache")
    assert (len(corpus.train), len(corpus.validation)) == (57, 3)
    shutil.copytree(tmp_path / "digits", tmp_path / "moved")
    shutil.copy(tmp_path / "moved" / "1" / "1.png", tmp_path / "moved" / "1" / "again.png")
    moved = prepare_folder(tmp_path / "moved", tmp_path / "other")
    assert moved.fingerprint == corpus.fingerprint
    assert moved.left_out("train") == "1 duplicate"
    assert prepare_folder(tmp_path / "digits", tmp_path / "cache", shuffle_seed=1).fingerprint != corpus.fingerprint
    assert isinstance(prepared(corpus.facts(), cache=tmp_path / "cache"), ImageCorpus)
    assert "0, 1, 2, 3" in corpus.describe()


def test_fashion_mnist_is_read_from_its_four_files(tmp_path: Path) -> None:
    (train, labels), (held_out, held_out_labels) = draw_digits(20), draw_digits(8, seed=1)
    write_idx(tmp_path / "idx", "train", train, labels)
    write_idx(tmp_path / "idx", "t10k", held_out, held_out_labels)
    spec = DataSpec(source="fashion_mnist", paths=(str(tmp_path / "idx"),), train_documents=12)
    corpus = prepare(spec, cache=tmp_path, progress=False)
    batch = pixels_of(corpus)
    assert len(corpus.train) == 12
    np.testing.assert_allclose((batch["pixel_values"][:, 0].numpy() + 1) * 127.5, held_out, atol=1e-4)
    assert batch["labels"].tolist() == held_out_labels.tolist()
    assert corpus.facts()["classes"][9] == "Ankle boot"
    broken = tmp_path / "idx" / "t10k-labels-idx1-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz cannot be read"):
        prepare(spec, cache=tmp_path / "other", progress=False)
    broken.unlink()
    with pytest.raises(ValueError, match="is not there; `apt install dataset-fashion-mnist` has it"):
        prepare(spec, cache=tmp_path, progress=False)


def test_a_class_may_have_a_number_above_255(tmp_path: Path) -> None:
    for number in range(300):
        for part in ("train", "held_out"):
            folder = tmp_path / part / f"{number:03}"
            folder.mkdir(parents=True)
            image = np.full((SIZE, SIZE), number % 256, np.uint8)
            image[0, :3] = [number // 256, part == "train", 0]
            Image.fromarray(image).save(folder / "0.png")
    corpus = prepare_folder(tmp_path / "train", tmp_path, validation_paths=(str(tmp_path / "held_out"),))
    assert sorted(pixels_of(corpus)["labels"].tolist()) == [*range(300)]


def colour(folder: Path) -> None:
    Image.new("RGB", (SIZE, SIZE)).save(folder / "0" / "colour.png")


def larger(folder: Path) -> None:
    Image.new("L", (SIZE, SIZE + 1)).save(folder / "0" / "large.png")


def unlabelled(folder: Path) -> None:
    shutil.move(folder / "0" / "0.png", folder / "0.png")


def transparent(folder: Path) -> None:
    Image.new("RGBA", (SIZE, SIZE)).save(folder / "0" / "glass.png")


def no_image(folder: Path) -> None:
    (folder / "0" / "0.png").write_text("no image")


def one_class(folder: Path) -> None:
    for digit in (1, 2, 3):
        shutil.rmtree(folder / str(digit))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (colour, "has [13] channel.* of 8 x 8 pixels, but .* [13] channel.*: give images of one size and kind"),
        (larger, "channel.* pixels, but .*: give images of one size and kind"),
        (unlabelled, "0.png has no class; put it into a subfolder of its class's name"),
        (transparent, "glass.png is an image of mode RGBA; allowed: 1, L, P, RGB"),
        (no_image, "0.png cannot be read as an image"),
        (one_class, "images of one class only, '0'"),
        (empty, "holds no image; give a folder with a subfolder of images for each class"),
    ],
)
def test_images_that_make_no_corpus_are_refused(tmp_path: Path, damage, message: str) -> None:
    folder = write_digits(tmp_path / "digits", 40)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        prepare_folder(folder, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data=files data.paths=[x]", "data=files is not read with model.family=vision: give data=fashion_mnist or"),
        ("data=images", "data=images needs data.paths"),
        ("data.tokenizer=gpt2", "data.tokenizer is not read with data=fashion_mnist"),
        ("data.context=49", "data.context=49, but an image of this model has 50 tokens"),
        ("train.objective=token_type", "train.objective=token_type reads text, and model.family=vision images"),
        ("model.family=decoder", "data=fashion_mnist is not read with model.family=decoder"),
        ("model.family=video", "family='video'; allowed"),
        ("preset=cpu model.patch_size=7", "model.patch_size=7 is read with model.family=vision only"),
        ("model.position=rotary", "position='rotary' is for family='decoder'"),
    ],
)
def test_a_run_of_another_family_is_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_run(["preset=fashion-vit", *words.split()])


def test_the_tokens_of_an_image_follow_from_its_sizes() -> None:
    assert compose_run(["preset=fashion-vit"]).spec.data.context == 50
    assert compose_run(["preset=fashion-vit", "model.patch_size=7", "model.pooling=mean"]).spec.data.context == 16
