"""Digits of seven segments on small noisy images, for runs of the family vision."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 8
# Segments top, upper left, upper right, middle, lower left, lower right, bottom, as rows and columns of a 7 x 4 cell.
_PLACES = [(0, slice(0, 4)), (slice(0, 4), 0), (slice(0, 4), 3), (3, slice(0, 4))]
_PLACES += [(slice(3, 7), 0), (slice(3, 7), 3), (6, slice(0, 4))]
_SEGMENTS = {0: "1110111", 1: "0010010", 2: "1011101", 3: "1011011"}


def draw_digits(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, 8, 8) bytes, and their digits 0 to 3."""
    generator = np.random.default_rng(seed)
    digits_N = np.arange(count) % len(_SEGMENTS)
    pixels_NPP = generator.integers(0, 60, (count, SIZE, SIZE), dtype=np.uint8)
    for pixels_PP, digit in zip(pixels_NPP, digits_N.tolist(), strict=True):
        top, left = generator.integers(0, 2), generator.integers(0, 5)
        cell = pixels_PP[top : top + 7, left : left + 4]
        for is_on, place in zip(_SEGMENTS[digit], _PLACES, strict=True):
            if is_on == "1":
                cell[place] = 200
    return pixels_NPP, digits_N


def write_digits(folder: Path, count: int, seed: int = 0) -> Path:
    """PNG files, one folder a digit."""
    for number, (pixels_PP, digit) in enumerate(zip(*draw_digits(count, seed), strict=True)):
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_PP).save(folder / str(digit) / f"{number}.png")
    return folder


def write_idx(folder: Path, name: str, pixels_NPP: np.ndarray, labels_N: np.ndarray) -> None:
    """Gzipped IDX files of one split, as Fashion-MNIST has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", pixels_NPP), ("labels-idx1", labels_N.astype(np.uint8))):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes(), mtime=0))
