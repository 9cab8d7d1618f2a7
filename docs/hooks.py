"""What the site shows beside the pages of docs/: files at the root, and the notebooks with their outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT_PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "records.md": "results/README.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    root = Path(config.docs_dir).parent
    for page, path in ROOT_PAGES.items():
        text = (root / path).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = file.src_uri.removesuffix("ipynb") + "md"
        files.append(File.generated(config, page, content=notebook_page(json.loads(file.content_string))))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that work beside the files become links between the pages of the site."""
    return markdown.replace(".ipynb)", ".md)").replace("](../results/README.md", "](records.md")


def notebook_page(notebook: dict[str, Any]) -> str:
    """The cells as Markdown, each with its stored outputs."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += map(_output, cell.get("outputs", []))
    return "\n\n".join(part for part in parts if part) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if image := data.get("image/png"):
        return f"![](data:image/png;base64,{''.join(image).strip()})"
    if html := "".join(data.get("text/html", "")):
        # One block of HTML without blank lines, with the site's own style.
        return re.sub(r"<style.*?</style>|(?<=<table)[^>]*|\n\s*", "", html, flags=re.DOTALL)
    text = "".join(data["text/plain"]).strip()
    return f"```text\n{text}\n```" if text else ""
