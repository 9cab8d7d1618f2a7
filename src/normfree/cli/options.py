"""Keys of commands, as classes that pydantic checks; and the checks that several commands share."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from normfree.store.runs import RUN_FILE


class Options(BaseModel):
    """Keys of a command: name, type, default and meaning of each."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelOptions(Options):
    """Keys of the commands that load MODEL and read a text."""

    text: Path | None = None
    """UTF-8 text file; unless given, the held-out text of a run, and for other models Python code of this machine."""
    context: int | None = None
    """Tokens in a window of a text; unless given, the model's own limit (measure: at most 1024)."""
    bos: bool | None = None
    """Begin every window with the BOS token; empty does as the tokenizer with a text (our models: without)."""
    device: str | None = None
    """cpu, cuda, ...; unless given, the GPU if there is one."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the weights; measures compute in fp32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    cache_dir: Path | None = None
    """Of a run: where its corpus is kept; unless given, NORMFREE_CACHE, else ~/.cache/normfree."""

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `load_pretrained`."""
        return {"dtype": self.dtype, "device": self.device, "trust_remote_code": self.trust_remote_code}


def uses_own_text(name: str, options: ModelOptions) -> bool:
    """True if MODEL is a run and no text is given. Raises ValueError for keys that have no effect then."""
    own = options.text is None and getattr(options, "images", None) is None and (Path(name) / RUN_FILE).is_file()
    if not own and options.cache_dir is not None:
        raise ValueError("cache_dir= is read for the text of a run only: leave it out")
    if ignored := [key for key in ("context", "stride", "bos") if own and getattr(options, key, None) is not None]:
        raise ValueError(f"{ignored[0]}= cuts a text, and a run's own is cut already: give text=FILE too")
    if own and getattr(options, "target", None) is not None:
        raise ValueError("target= needs its source: give text=FILE too, or leave target= out for the run's own blocks")
    return own


def measured_place(name: str) -> tuple[str, Path]:
    """The label of a model that is no run, and the folder of its measurement."""
    label = Path(name).resolve().name if Path(name).exists() else name
    return label, Path("measured") / label.replace("/", "--")


def read_text(path: Path | None, key: str = "text") -> str:
    """The file that `key`= names, or held-out Python code of this machine. Raises ValueError if it cannot be read."""
    if path is None:
        from normfree.data import held_out_text

        return held_out_text()
    try:
        text = path.read_bytes().decode()  # as training reads it: line ends stay as they are
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}={path} cannot be read ({error}); give a UTF-8 text file") from None
    if not text.strip():
        raise ValueError(f"{key}={path} is empty")
    return text


def check_writable(output: Path) -> None:
    """Raises ValueError for a folder that could not be made, or not be written in."""
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"output={output}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"output={output}: {existing} may not be written in; name another folder")
