"""Images as corpora: what a model reads of them, what is held out, and what is refused."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data import Corpus, ImageCorpus, prepared
from normfree.model import HEADS
from normfree.pretrained.inputs import read_images
from normfree.spec.run import DataSpec
from tests.data.prepare import make
from tests.images import SIZE, draw_digits, write_digits


def folder_spec(folder: Path) -> DataSpec:
    return DataSpec(source="images", paths=(str(folder),))


def held_out(corpus: Corpus) -> dict[str, torch.Tensor]:
    kind = HEADS["vision"]
    config = kind.config_class(image_size=SIZE, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    return kind(config).batch_of(torch.from_numpy(corpus.held_out_ids()))


def test_a_model_reads_what_its_processor_makes_of_files(tmp_path: Path) -> None:
    corpus = make(folder_spec(write_digits(tmp_path / "digits", 60)), tmp_path / "cache")
    files = read_images(tmp_path / "digits", corpus.processor(), 60, channels=1)["pixel_values"]
    labels = [int(path.parent.name) for path in sorted((tmp_path / "digits").rglob("*.png"))]
    for image, label in zip(*held_out(corpus).values(), strict=True):
        distances = (files - image).abs().amax((1, 2, 3))
        assert distances.min() < 1e-6
        assert labels[distances.argmin()] == label


def test_every_twentieth_image_is_held_out_wherever_it_lies(tmp_path: Path) -> None:
    corpus = make(folder_spec(write_digits(tmp_path / "digits", 60)), tmp_path / "cache")
    assert (len(corpus.train), len(corpus.validation)) == (57, 3)
    shutil.copytree(tmp_path / "digits", tmp_path / "moved")
    shutil.copy(tmp_path / "moved" / "1" / "1.png", tmp_path / "moved" / "1" / "again.png")
    moved = make(folder_spec(tmp_path / "moved"), tmp_path / "other")
    assert moved.fingerprint == corpus.fingerprint
    assert moved.left_out("train") == "1 duplicate"
    assert isinstance(prepared(corpus.facts(), cache=tmp_path / "cache"), ImageCorpus)
    assert "4 classes, 57 images to train on, 3 held-out images" in corpus.describe()


def test_fashion_mnist_is_read_from_its_four_files(tmp_path: Path) -> None:
    splits = {"train": draw_digits(20), "t10k": draw_digits(8, seed=1)}
    for name, (pixels, labels) in splits.items():
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels.astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    spec = DataSpec(source="fashion_mnist", paths=(str(tmp_path),), train_documents=12)
    corpus = make(spec, tmp_path)
    batch = held_out(corpus)
    assert len(corpus.train) == 12
    np.testing.assert_allclose((batch["pixel_values"][:, 0].numpy() + 1) * 127.5, splits["t10k"][0], atol=1e-4)
    assert batch["labels"].tolist() == splits["t10k"][1].tolist()
    broken = tmp_path / "t10k-labels-idx1-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz cannot be read"):
        make(spec, tmp_path / "other")
    broken.unlink()
    with pytest.raises(ValueError, match="is not there; `apt install dataset-fashion-mnist` has it"):
        make(spec, tmp_path)


def draw(name: str, mode: str, height: int = SIZE) -> Callable[[Path], None]:
    return lambda folder: Image.new(mode, (SIZE, height)).save(folder / name)


def hub_spec(folder: Path) -> DataSpec:
    return DataSpec(source="hub_images", dataset=str(folder), validation_split="test")


def test_a_data_set_of_images_goes_through_load_dataset(tmp_path: Path) -> None:
    write_digits(tmp_path / "hub" / "train", 40)
    write_digits(tmp_path / "hub" / "test", 8, seed=1)
    corpus = make(hub_spec(tmp_path / "hub"), tmp_path / "cache")
    assert (corpus.facts()["classes"], len(corpus.train)) == (["0", "1", "2", "3"], 40)
    images, labels = held_out(corpus).values()
    drawn, digits = draw_digits(8, seed=1)
    expected = torch.from_numpy(drawn).float()[:, None] / 127.5 - 1
    order = torch.cdist(images.flatten(1), expected.flatten(1)).argmin(1)
    torch.testing.assert_close(images, expected[order])
    assert sorted(order.tolist()) == list(range(8))
    assert labels.tolist() == digits[order].tolist()


def test_a_data_set_of_texts_has_no_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"content": "a"}\n')
    with pytest.raises(ValueError, match=r"needs a column of type Image and one of type ClassLabel: content \(Value\)"):
        make(hub_spec(tmp_path), tmp_path / "cache")


SIZES_DIFFER = "has [13] channel.* of [89] x 8 pixels, but .* [13] channel.*: give one size and kind"


@pytest.mark.parametrize(
    ("source", "damage", "message"),
    [
        ("images", draw("0/colour.png", "RGB"), SIZES_DIFFER),
        ("images", draw("0.png", "L"), "0.png has no class; put it into a subfolder of its class's name"),
        ("images", draw("0/glass.png", "RGBA"), "glass.png is an image of mode RGBA; allowed: 1, L, P, RGB"),
        ("images", lambda folder: (folder / "0" / "0.png").write_text("no"), "0.png cannot be read as an image"),
        ("images", lambda folder: [shutil.rmtree(folder / name) for name in "123"], "has only the class '0'"),
        ("images", lambda folder: shutil.copy(folder / "0" / "0.png", folder / "1"), "are one image of two classes"),
        ("images", shutil.rmtree, "holds no image; give one with a subfolder of images for each class"),
        ("hub_images", draw("0/tall.png", "L", SIZE + 1), SIZES_DIFFER),
        ("hub_images", draw("0/glass.png", "RGBA"), r"split train, row \d+ is an image of mode RGBA"),
        ("hub_images", shutil.rmtree, "cannot be loaded"),
    ],
)
def test_images_that_make_no_corpus_are_refused(tmp_path: Path, source: str, damage: Any, message: str) -> None:
    for split in ("train", "test"):
        write_digits(tmp_path / "data" / split, 40)
    damage(tmp_path / "data" / "train")
    spec = folder_spec(tmp_path / "data" / "train") if source == "images" else hub_spec(tmp_path / "data")
    with pytest.raises(ValueError, match=message) as error:
        make(spec, tmp_path / "cache")
    assert "\n" not in str(error.value)
