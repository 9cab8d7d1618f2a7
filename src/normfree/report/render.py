"""Reproducible bytes of a matplotlib figure: SVG for the page, PDF, PNG.

It is drawn with the settings of its layout, because they decide how many ticks fit and how wide labels are.
"""

from __future__ import annotations

import io
import re

from matplotlib.figure import Figure

from normfree.report.plots.style import COLOURS, drawing_settings

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_ID = re.compile(r' id="([^"]*)"')
_COORDINATES = re.compile(r' (?:d|x|y)="[^"]*"')
_SUPERFLUOUS = re.compile(r""" transform="rotate\(-0 [^"]*"|font-family: 'DejaVu Sans'; |; stroke-linecap: square""")
_DECIMALS = re.compile(r"(\.\d)\d+")
_TITLE = re.compile(r' id="title:([^"]*)">')
_USED = re.compile(r'(?:url\(#|href="#)([^")]+)')


def to_svg(figure: Figure, prefix: str) -> str:
    """Inline SVG without prologue: text stays text, colours follow the page, ids begin with `prefix`.

    An artist whose gid is `title:TEXT` shows the text on hover.
    """
    with drawing_settings(**{"svg.fonttype": "none", "svg.hashsalt": "normfree"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = _COMMENT.sub("", file.getvalue())
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = _TITLE.sub(r"><title>\1</title>", text)
    text = _COORDINATES.sub(lambda match: _DECIMALS.sub(r"\1", match[0]), _SUPERFLUOUS.sub("", text))
    used = {name: f"{prefix}-{place}" for place, name in enumerate(dict.fromkeys(_USED.findall(text)))}
    text = _ID.sub(lambda match: f' id="{used[match[1]]}"' if match[1] in used else "", text)
    text = _USED.sub(lambda match: match[0][: -len(match[1])] + used[match[1]], text)
    for name, (on_white, _) in COLOURS.items():  # the page defines them for light and dark mode
        text = text.replace(on_white, f"var(--{name})")
    # As wide as the box around it, and hidden from screen readers, which read the name of the figure.
    head, _, drawing = text.partition(">")
    head = re.sub(r' (?:width|height|xmlns(?::\w+)?|version)="[^"]*"', "", head)
    drawing = re.sub(r"\n\s*", "\n", drawing)
    return f'{head} aria-hidden="true" focusable="false">{drawing}'


def to_file(figure: Figure, suffix: str) -> bytes:
    """A `pdf` for papers, with TrueType text and no date, or a `png` on white, 150 dots an inch."""
    options = {"pdf": {"metadata": {"CreationDate": None}}, "png": {"dpi": 150, "facecolor": "white"}}
    file = io.BytesIO()
    with drawing_settings(**{"pdf.fonttype": 42}):
        figure.savefig(file, format=suffix, **options[suffix])
    return file.getvalue()
