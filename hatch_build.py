"""Describe the package on an index with README.md, without images and links that only work beside the other files."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

_NOT_ABSOLUTE = r"(?!https?://)"


class IndexReadme(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = re.sub(
            rf"!\[[^]]*\]\({_NOT_ABSOLUTE}[^)]*\)\n(?:\n\*.*?\*\n)?", "", text, flags=re.DOTALL
        )  # and its caption
        text = re.sub(rf"\[([^]]*)\]\({_NOT_ABSOLUTE}[^)]*\)", r"\1", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
