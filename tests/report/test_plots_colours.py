"""Colours tell lines apart for readers who see fewer of them, on white paper and on the page's dark ground."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

import normfree.report
from normfree.report.plots.curves import LAYER_COLOURS
from normfree.report.plots.style import COLOURS, variant_styles

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
# severity 1, on linear sRGB.
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
# IEC 61966-2-1: linear sRGB to XYZ under D65.
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
GROUNDS = ("#ffffff", "#12161c")
"""The page in light and in dark surroundings."""
LINES = ("blue", "sky", "orange", "green", "purple", "gold", "violet", "olive", "grey")


def linear(colour: str | tuple[float, ...]) -> NDArray[np.float64]:
    values = np.array(to_rgb(colour))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(linear_rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b*: distances in it are about as large as they look."""
    share = TO_XYZ @ linear_rgb.clip(0, 1) / TO_XYZ.sum(axis=1)
    root = np.where(share > (6 / 29) ** 3, np.cbrt(share), share / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def distance(one: str | tuple[float, ...], other: str | tuple[float, ...]) -> float:
    """The smallest over all sights."""
    return min(float(np.linalg.norm(lab(m @ linear(one)) - lab(m @ linear(other)))) for m in SIGHTS.values())


def contrast(one: str | tuple[float, ...], other: str) -> float:
    """WCAG."""
    low, high = sorted(float(TO_XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("ground", [0, 1])
def test_lines_differ_for_every_sight_on_both_backgrounds(ground: int) -> None:
    colours = [COLOURS[name][ground] for name in LINES]
    assert min(distance(a, b) for a, b in itertools.combinations(colours, 2)) > 20
    assert min(contrast(colour, GROUNDS[ground]) for colour in colours) > 3


@pytest.mark.parametrize("ground", [0, 1])
def test_text_of_the_page_is_legible(ground: int) -> None:
    css = (Path(normfree.report.__file__).parent / "templates" / "style.css").read_text()
    paper, card, link = re.findall(r"--paper: (#\w+); --card: (#\w+); --link: (#\w+);", css)[ground]
    texts = [link, *(COLOURS[name][ground] for name in ("ink", "muted", "red"))]
    assert min(contrast(text, behind) for text in texts for behind in (paper, card)) > 4.5


def test_lines_have_no_other_colours() -> None:
    styles = variant_styles(["SM+LN+G", "SM+LN+R", "SM+G", "SM+R", *(f"v{i}" for i in range(20))])
    assert {style["color"] for style in styles.values()} == {COLOURS[name][0] for name in LINES}
    assert len({str(style["linestyle"]) for style in list(styles.values())[:4]}) == 4
    assert len({(style["color"], str(style["linestyle"])) for style in styles.values()}) == 24
    assert variant_styles(["x", "SM+G"])["SM+G"] == styles["SM+G"]  # in every figure


def test_layers_become_lighter_with_depth_for_every_sight() -> None:
    colours = [LAYER_COLOURS(layer / 11) for layer in range(12)]
    for matrix in SIGHTS.values():
        lightness = [lab(matrix @ linear(colour))[0] for colour in colours]
        assert all(deeper > layer for layer, deeper in itertools.pairwise(lightness))
        assert lightness[-1] - lightness[0] > 20
    assert min(contrast(colour, ground) for colour in colours for ground in GROUNDS) > 2.3
