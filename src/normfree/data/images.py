"""Images with a class each, from Fashion-MNIST or from folders, as rows of bytes in a corpus folder.

Shapes: N images, C channels, P pixels on each side, B = C P P + 2 bytes of a row: the pixels, by channel and line, then
the number of the class, its high byte first.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from normfree.data.packing import BLOCKS_AT_ONCE, unigram_perplexity
from normfree.data.sources import HOLD_OUT_EVERY, Split
from normfree.files import fingerprint, sha256_bytes, sha256_file
from normfree.spec.run import DataSpec

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has it."""
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_FILES: dict[Split, str] = {"train": "train", "validation": "t10k"}
_CHANNELS = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}
"""Modes of Pillow that are read, and what they become."""


class Images(NamedTuple):
    """Images of one size, and the numbers of their classes."""

    pixels_NCPP: np.ndarray
    labels_N: np.ndarray

    def rows(self) -> np.ndarray:
        """(N, B) bytes."""
        labels_N2 = self.labels_N.astype(">u2")[:, None].view(np.uint8)
        return np.concatenate([self.pixels_NCPP.reshape(len(self.labels_N), -1), labels_N2], axis=1)


class FashionMnist:
    """Fashion-MNIST (arXiv 1708.07747): four gzipped IDX files, 60,000 images to train on and 10,000 held out.

    Raises ValueError, with the package that has them, if the files are not there.
    """

    classes = _FASHION

    def __init__(self, spec: DataSpec) -> None:
        folder = Path(spec.paths[0]).expanduser() if spec.paths else FASHION_MNIST
        kinds = {"images": "images-idx3", "labels": "labels-idx1"}
        self._files = {
            split: {kind: folder / f"{name}-{kinds[kind]}-ubyte.gz" for kind in kinds} for split, name in _FILES.items()
        }
        if missing := [file for files in self._files.values() for file in files.values() if not file.is_file()]:
            raise ValueError(
                f"data=fashion_mnist: {missing[0]} is not there; `apt install dataset-fashion-mnist` has it, or give "
                "data.paths=[FOLDER] with the four files"
            )

    @property
    def versions(self) -> dict[str, Any]:
        """Hashes of the files of each split."""
        return {split: fingerprint([*map(sha256_file, files.values())]) for split, files in self._files.items()}

    def read(self, split: Split, dropped: Counter[str]) -> Images:
        """The images of a split in their published order. Raises ValueError for a damaged file."""
        files = self._files[split]
        pixels_NPP, labels_N = (_read_idx(files[kind], axes) for kind, axes in (("images", 3), ("labels", 1)))
        if len(pixels_NPP) != len(labels_N) or labels_N.max(initial=0) >= len(self.classes):
            raise ValueError(
                f"{files['labels']} does not fit its images: {len(labels_N)} labels, {len(pixels_NPP)} images"
            )
        return Images(pixels_NPP[:, None], labels_N.astype(np.int64))


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """The bytes of an IDX file: 0, 0, 8 for bytes, the number of axes, then each length in four bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): install it again") from None
    start = 4 + 4 * axes
    lengths = np.frombuffer(content[4:start], ">u4").tolist()
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) - start != np.prod(lengths, dtype=np.int64):
        raise ValueError(f"{path} is no IDX file of {axes} axes of bytes: install it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(lengths)


class ImageFolders:
    """Folders with a subfolder of images for each class, whose name is the class.

    Images are ordered by content hash and seed, and each counts once. Without validation paths every twentieth is held
    out. Raises ValueError for folders without classes, and images of several sizes or with several numbers of channels.
    """

    def __init__(self, spec: DataSpec) -> None:
        self._spec, self._files = spec, 0
        train = self._labelled("data.paths", spec.paths)
        self.classes = tuple(sorted({name for name, _ in train.values()}))
        if len(self.classes) < 2:
            raise ValueError(
                f"data.paths has images of one class only, {self.classes[0]!r}: give a folder for each class"
            )
        validation = self._labelled("data.validation_paths", spec.validation_paths) if spec.validation_paths else {}
        if unknown := {name for name, _ in validation.values()} - {*self.classes}:
            raise ValueError(f"data.validation_paths has the class {min(unknown)!r}, which data.paths has not")
        hashes = sorted(train, key=lambda sha256: sha256_bytes(f"{spec.shuffle_seed}:{sha256}".encode()))
        held_out = set(validation) if validation else set(hashes[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY])
        self._of_split: dict[Split, list[tuple[str, Path]]] = {
            "train": [train[sha256] for sha256 in hashes if sha256 not in held_out],
            "validation": [*validation.values()] or [train[sha256] for sha256 in hashes if sha256 in held_out],
        }
        self._duplicates = self._files - sum(map(len, self._of_split.values()))
        for split, files in self._of_split.items():
            if not files:
                raise ValueError(f"data=images gives no {split} image: give more, or data.validation_paths")

    def _labelled(self, key: str, places: tuple[str, ...]) -> dict[str, tuple[str, Path]]:
        """The class and file of each image, by the sha256 of the file."""
        from PIL.Image import registered_extensions

        endings, found = registered_extensions(), {}
        for folder in (Path(place).expanduser() for place in places):
            paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)
            if not paths:
                raise ValueError(
                    f"{key}: {folder} holds no image; give a folder with a subfolder of images for each class"
                )
            if unlabelled := [path for path in paths if path.parent == folder]:
                raise ValueError(f"{key}: {unlabelled[0]} has no class; put it into a subfolder of its class's name")
            self._files += len(paths)
            found |= {sha256_file(path): (path.relative_to(folder).parts[0], path) for path in paths}
        return found

    @cached_property
    def versions(self) -> dict[str, Any]:
        """Classes, and hashes of the files of each split, in their order."""
        hashes = {
            split: fingerprint([[name, sha256_file(path)] for name, path in files])
            for split, files in self._of_split.items()
        }
        return {"classes": list(self.classes), **hashes}

    def read(self, split: Split, dropped: Counter[str]) -> Images:
        """The images of a split. Raises ValueError for a file that is no image, or of another shape than the first."""
        dropped["duplicate"] += self._duplicates if split == "train" else 0
        first, shape = self._of_split["train"][0][1], None
        pixels, labels = [], []
        most = {"train": self._spec.train_documents, "validation": self._spec.validation_documents}[split]
        for name, path in islice(self._of_split[split], most):
            image_CPP = _read_image(path)
            shape = shape or _read_image(first).shape
            if image_CPP.shape != shape:
                ours, theirs = (f"{c} channel(s) of {h} x {w}" for c, h, w in (image_CPP.shape, shape))
                raise ValueError(f"{path} has {ours} pixels, but {first} {theirs}: give images of one size and kind")
            pixels.append(image_CPP)
            labels.append(self.classes.index(name))
        return Images(np.stack(pixels), np.array(labels))


def _read_image(path: Path) -> np.ndarray:
    """(C, height, width) bytes."""
    from PIL.Image import open as decode_image

    try:
        with decode_image(path) as image:
            if image.mode not in _CHANNELS:
                raise ValueError(f"{path} is an image of mode {image.mode}; allowed: {', '.join(_CHANNELS)}")
            pixels = np.asarray(image.convert(_CHANNELS[image.mode]))
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from None
    return np.ascontiguousarray(np.moveaxis(np.atleast_3d(pixels), 2, 0))


def write_images(spec: DataSpec, source: FashionMnist | ImageFolders, folder: Path) -> dict[str, Any]:
    """Write train.arrow, validation.arrow and the image processor; returns the facts of the corpus."""
    facts: dict[str, Any] = {"source": spec.source, "versions": source.versions, "dropped": {}}
    most: Mapping[Split, int | None] = {"train": spec.train_documents, "validation": spec.validation_documents}
    counts_K, hashes = {}, {}
    channels, size = 0, 0
    for split in ("train", "validation"):
        dropped: Counter[str] = Counter()
        pixels_NCPP, labels_N = (part[: most[split]] for part in source.read(split, dropped))
        _, channels, size, width = pixels_NCPP.shape
        if size != width:
            raise ValueError(f"data={spec.source} has images of {size} x {width} pixels; only squares are read")
        rows_NB = Images(pixels_NCPP, labels_N).rows()
        _write_rows(folder / f"{split}.arrow", rows_NB)
        hashes[split], counts_K[split] = (
            sha256_bytes(rows_NB.tobytes()),
            np.bincount(labels_N, minlength=len(source.classes)),
        )
        facts[f"{split}_blocks"] = facts[f"{split}_documents"] = len(rows_NB)
        facts[f"{split}_bytes"] = rows_NB.size
        facts["dropped"][split] = dict(+dropped)
    _image_processor(channels, size).save_pretrained(folder)
    shape = {"image_size": size, "num_channels": channels, "classes": list(source.classes)}
    shares_K = counts_K["validation"] / counts_K["validation"].sum()
    return facts | {
        **shape,
        "fingerprint": fingerprint([1, shape, hashes]),
        "vocab_size": len(source.classes),
        "unigram_perplexity": unigram_perplexity(counts_K["train"], counts_K["validation"]),
        "majority_accuracy": float(shares_K[counts_K["train"].argmax()]),
    }


def _write_rows(path: Path, rows_NB: np.ndarray) -> None:
    def tables() -> Iterator[pyarrow.Table]:
        for start in range(0, len(rows_NB), BLOCKS_AT_ONCE):
            part_NB = rows_NB[start : start + BLOCKS_AT_ONCE]
            flat = pyarrow.array(part_NB.reshape(-1))
            yield pyarrow.table({"input_ids": pyarrow.FixedSizeListArray.from_arrays(flat, part_NB.shape[1])})

    parts = list(tables())
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, parts[0].schema) as writer:
        for table in parts:
            writer.write_table(table)


def _image_processor(channels: int, size: int) -> Any:
    """What makes of an image file what a model is trained on."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    statistics = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    return ViTImageProcessorPil(size={"height": size, "width": size}, **statistics)


IMAGE_SOURCES = {"fashion_mnist": FashionMnist, "images": ImageFolders}
