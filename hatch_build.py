"""Describe the package on an index with README.md. Its links become absolute, or plain words without an address.

The address is `Repository` of [project.urls]: images and links then lead to the files of the version's tag.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

_TARGET = r"\]\((?!https?://)([^)]*)\)"


class IndexReadme(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        if repository := metadata.get("urls", {}).get("Repository"):
            tag = f"v{metadata['version']}"
            text = re.sub(rf"(!\[[^]]*){_TARGET}", rf"\1]({repository}/raw/{tag}/\2)", text)
            text = re.sub(rf"(\[[^]]*){_TARGET}", rf"\1]({repository}/blob/{tag}/\2)", text)
        else:
            text = re.sub(rf"!\[[^]]*{_TARGET}\n(?:\n\*.*?\*\n)?", "", text, flags=re.DOTALL)  # and its caption
            text = re.sub(rf"\[([^]]*){_TARGET}", r"\1", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
