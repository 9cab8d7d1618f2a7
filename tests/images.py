"""Digits of seven segments on small noisy images, for runs of the family vision."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 8
# Segments top, upper left, upper right, middle, lower left, lower right, bottom, as rows and columns of a 7 x 4 cell.
_PLACES = [(0, slice(0, 4)), (slice(0, 4), 0), (slice(0, 4), 3), (3, slice(0, 4))]
_PLACES += [(slice(3, 7), 0), (slice(3, 7), 3), (6, slice(0, 4))]
_SEGMENTS = ("1110111", "0010010", "1011101", "1011011")


def draw_digits(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, 8, 8) bytes, and their digits 0 to 3."""
    generator, digits_N = np.random.default_rng(seed), np.arange(count) % len(_SEGMENTS)
    pixels_NPP = generator.integers(0, 60, (count, SIZE, SIZE), dtype=np.uint8)
    for pixels_PP, digit in zip(pixels_NPP, digits_N, strict=True):
        top, left = generator.integers(0, 2), generator.integers(0, 5)
        for is_on, place in zip(_SEGMENTS[digit], _PLACES, strict=True):
            if is_on == "1":
                pixels_PP[top : top + 7, left : left + 4][place] = 200
    return pixels_NPP, digits_N


def write_digits(folder: Path, count: int, seed: int = 0) -> Path:
    """PNG files, one folder a digit."""
    for number, (pixels_PP, digit) in enumerate(zip(*draw_digits(count, seed), strict=True)):
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_PP).save(folder / str(digit) / f"{number}.png")
    return folder
