"""Images with a class each, from Fashion-MNIST, folders or the hub, as rows of bytes in a corpus folder.

Shapes: N images, C channels, P pixels on each side, B = C P P + 2 bytes of a row: the pixels, by channel and line, then
the number of the class, its high byte first.
"""

import gzip
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow
from datasets import ClassLabel
from datasets import Image as HubImage

from normfree.data.packing import BLOCKS_AT_ONCE, unigram_perplexity
from normfree.data.sources import HOLD_OUT_EVERY, HubSource, Split
from normfree.files import fingerprint, sha256_bytes, sha256_file
from normfree.spec.run import DataSpec

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
_CHANNELS = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # modes of Pillow that are read, and what they become
Labelled = Iterator[tuple[str, np.ndarray, int]]
"""The place that an image comes from, its bytes (C, P, P), and the number of its class."""


class FashionMnist:
    """Fashion-MNIST (arXiv 1708.07747): four gzipped IDX files, 60,000 images to train on and 10,000 held out.

    Raises ValueError, with the package that has them, if the files are not there.
    """

    classes = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]

    def __init__(self, spec: DataSpec) -> None:
        folder = Path(spec.paths[0]).expanduser() if spec.paths else FASHION_MNIST
        names: dict[Split, str] = {"train": "train", "validation": "t10k"}
        kinds = ("images-idx3", "labels-idx1")
        self._files = {split: [folder / f"{name}-{kind}-ubyte.gz" for kind in kinds] for split, name in names.items()}
        if missing := [file for files in self._files.values() for file in files if not file.is_file()]:
            advice = "`apt install dataset-fashion-mnist` has it, or give data.paths=[FOLDER] with the four files"
            raise ValueError(f"data=fashion_mnist: {missing[0]} is not there; {advice}")
        self.versions = {split: fingerprint([*map(sha256_file, files)]) for split, files in self._files.items()}

    def read(self, split: Split, dropped: Counter[str]) -> Labelled:
        """Images in their published order. Raises ValueError for a damaged file."""
        images, labels = self._files[split]
        for pixels_PP, label in zip(_read_idx(images, 3), _read_idx(labels, 1), strict=True):
            yield str(images), pixels_PP[None], label


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """The bytes of an IDX file: 0, 0, 8 for bytes, the number of axes, then each length in four bytes."""
    start = 4 + 4 * axes
    try:
        content = gzip.decompress(path.read_bytes())
        return np.frombuffer(content, np.uint8, offset=start).reshape(np.frombuffer(content[4:start], ">u4"))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): install it again") from None


def visible_images(folder: Path, endings: Collection[str]) -> list[Path]:
    """The images in a folder and the folders in it, sorted by path, without hidden files and folders."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in endings)
    return sorted(path for path in paths if not any(part[0] == "." for part in path.relative_to(folder).parts))


class ImageFolders:
    """Folders with a subfolder of images for each class, whose name is the class.

    Images are ordered by content hash and seed, and each counts once. Without validation paths every twentieth is held
    out. Raises ValueError for folders without classes.
    """

    def __init__(self, spec: DataSpec) -> None:
        self._found = 0
        train = self._labelled("data.paths", spec.paths)
        self.classes = sorted({name for name, _ in train.values()})
        if len(self.classes) < 2:
            raise ValueError(f"data.paths has only the class {self.classes[0]!r}: give a subfolder for each class")
        validation = self._labelled("data.validation_paths", spec.validation_paths) if spec.validation_paths else {}
        if unknown := {name for name, _ in validation.values()} - {*self.classes}:
            raise ValueError(f"data.validation_paths has the class {min(unknown)!r}, which data.paths has not")
        hashes = sorted(train, key=lambda sha256: sha256_bytes(f"{spec.shuffle_seed}:{sha256}".encode()))
        validation = validation or {sha256: train[sha256] for sha256 in hashes[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]}
        files: dict[Split, dict[str, tuple[str, Path]]] = {
            "train": {sha256: train[sha256] for sha256 in hashes if sha256 not in validation},
            "validation": dict(sorted(validation.items())),
        }
        self._of_split = {split: list(labelled.values()) for split, labelled in files.items()}
        if not all(self._of_split.values()):
            raise ValueError(f"data=images: {len(train)} images are too few: give more, or data.validation_paths")
        self.versions = {
            split: fingerprint([[name, sha256] for sha256, (name, _) in labelled.items()])
            for split, labelled in files.items()
        }

    def _labelled(self, key: str, places: tuple[str, ...]) -> dict[str, tuple[str, Path]]:
        """The class and file of each image, by the sha256 of the file."""
        from PIL.Image import registered_extensions

        endings = registered_extensions()
        labelled: dict[str, tuple[str, Path]] = {}
        for folder in (Path(place).expanduser() for place in places):
            paths = visible_images(folder, endings)
            if not paths:
                raise ValueError(f"{key}: {folder} holds no image; give one with a subfolder of images for each class")
            if unlabelled := [path for path in paths if path.parent == folder]:
                raise ValueError(f"{key}: {unlabelled[0]} has no class; put it into a subfolder of its class's name")
            self._found += len(paths)
            for path in paths:
                name, sha256 = path.relative_to(folder).parts[0], sha256_file(path)
                other, twin = labelled.setdefault(sha256, (name, path))
                if other != name:
                    raise ValueError(f"{key}: {twin} and {path} are one image of two classes: remove one of them")
        return labelled

    def read(self, split: Split, dropped: Counter[str]) -> Labelled:
        """Raises ValueError for what is no image."""
        from PIL.Image import open as decode_image

        if split == "train":
            dropped["duplicate"] = self._found - sum(map(len, self._of_split.values()))
        for name, path in self._of_split[split]:
            try:
                with decode_image(path) as image:
                    yield str(path), _pixels(image, str(path)), self.classes.index(name)
            except OSError as error:
                raise ValueError(f"{path} cannot be read as an image ({error})") from None


class HubImages:
    """A Hugging Face data set of images with a class each: a hub name, or a folder that `datasets.load_dataset` reads.

    Raises ValueError for a data set that cannot be loaded, or without a column of images and one of classes.
    """

    def __init__(self, spec: DataSpec) -> None:
        self._spec, self.hub = spec, HubSource(spec)
        self.versions = self.hub.versions

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return self.hub.load("train").features[self._columns("train")[1]].names

    def _columns(self, split: Split) -> list[str]:
        features = self.hub.load(split).features
        found = [[name for name, kind in features.items() if isinstance(kind, k)] for k in (HubImage, ClassLabel)]
        if not all(found):
            columns = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
            raise ValueError(f"{self._spec.dataset} needs a column of type Image and one of type ClassLabel: {columns}")
        return [names[0] for names in found]

    def read(self, split: Split, dropped: Counter[str]) -> Labelled:
        """Images in shuffled order."""
        image, label = self._columns(split)
        name = f"{self._spec.dataset}, split {split}"
        rows = self.hub.load(split).shuffle(seed=self._spec.shuffle_seed)
        try:
            for number, row in enumerate(cast(Any, rows)):
                where = f"{name}, row {number}"
                yield where, _pixels(row[image], where), row[label]
        except OSError as error:
            raise ValueError(f"{name} cannot be read as images ({error})") from None


def _pixels(image: Any, where: str) -> np.ndarray:
    if image.mode not in _CHANNELS:
        raise ValueError(f"{where} is an image of mode {image.mode}; allowed: {', '.join(_CHANNELS)}")
    return np.moveaxis(np.atleast_3d(np.asarray(image.convert(_CHANNELS[image.mode]))), 2, 0)


ImageSource = FashionMnist | ImageFolders | HubImages


def write_images(spec: DataSpec, source: ImageSource, folder: Path) -> dict[str, Any]:
    """Write train.arrow, validation.arrow and the image processor; returns the facts of the corpus."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    facts: dict[str, Any] = {"source": spec.source, "versions": source.versions, "dropped": {}}
    counts_K, hashes, first = {}, {}, None
    limits: dict[Split, int | None] = {"train": spec.train_documents, "validation": spec.validation_documents}
    for split, most in limits.items():
        dropped: Counter[str] = Counter()
        pixels, labels = [], []
        for where, pixels_CPP, label in islice(source.read(split, dropped), most):
            first = first or (where, pixels_CPP.shape)
            if pixels_CPP.shape != first[1]:
                given, expected = (f"{c} channel(s) of {h} x {w}" for c, h, w in (pixels_CPP.shape, first[1]))
                raise ValueError(f"{where} has {given} pixels, but {first[0]} {expected}: give one size and kind")
            pixels.append(pixels_CPP.reshape(-1))
            labels.append(label)
        labels_N = np.array(labels)
        rows_NB = np.concatenate([np.stack(pixels), labels_N.astype(">u2")[:, None].view(np.uint8)], axis=1)
        table = pyarrow.table({"input_ids": pyarrow.FixedSizeListArray.from_arrays(rows_NB.ravel(), rows_NB.shape[1])})
        path = str(folder / f"{split}.arrow")
        with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=BLOCKS_AT_ONCE)
        hashes[split], facts["dropped"][split] = sha256_bytes(rows_NB.tobytes()), dict(+dropped)
        counts_K[split] = np.bincount(labels_N, minlength=len(source.classes))
        facts[f"{split}_blocks"] = facts[f"{split}_documents"] = len(rows_NB)
    assert first is not None, "every source has images"
    channels, size, width = first[1]
    if size != width:
        raise ValueError(f"data={spec.source} has images of {size} x {width} pixels; only squares are read")
    mean, size_PP = [0.5] * channels, {"height": size, "width": size}
    ViTImageProcessorPil(size=size_PP, image_mean=mean, image_std=mean).save_pretrained(folder)
    facts |= {"image_size": size, "num_channels": channels, "classes": list(source.classes)}
    if isinstance(source, HubImages):
        facts["revisions"] = source.hub.revisions
    return facts | {
        "fingerprint": fingerprint([1, size, channels, facts["classes"], hashes]),
        "vocab_size": len(source.classes),
        "unigram_perplexity": unigram_perplexity(counts_K["train"], counts_K["validation"]),
        "majority_accuracy": float(counts_K["validation"][counts_K["train"].argmax()] / facts["validation_blocks"]),
    }


IMAGE_SOURCES = {"fashion_mnist": FashionMnist, "images": ImageFolders, "hub_images": HubImages}
