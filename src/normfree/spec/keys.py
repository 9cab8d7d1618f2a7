"""Checked dataclasses from plain values, the meaning of every key, and the nearest name to a wrong one."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Built = TypeVar("Built")
_MODEL = Path(__file__).parents[1] / "model" / "configuration.py"
_MODEL_FIELD = re.compile(r'^    (\w+): (.+) = (.+)\n    """(.+)"""$', re.MULTILINE)


def build(kind: type[Built], values: Mapping[str, Any]) -> Built:
    """A checked dataclass from plain values. Raises ValueError that names every mistake and the nearest valid key."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(problem, kind) for problem in error.errors())) from None


def _explain(problem: Any, kind: type) -> str:
    key, keys = ".".join(part for part in problem["loc"] if isinstance(part, str)), describe_keys(kind)
    if key not in keys and (whole := key.rpartition(".")[0]) in keys:  # one of the types that a key may have
        key = whole
    match problem["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"unknown key {key!r}; {nearest(key, list(keys))}"
        case "missing" | "missing_argument":
            return f"{key} is missing"
        case "value_error":
            return str(problem["ctx"]["error"])
        case "tuple_type":
            return f"{key}={problem['input']!r} must be a list, e.g. {key}=[{problem['input']}]"
    return f"{key}={problem['input']!r}: {problem['msg'].replace('Input should', 'it should')}"


def fields_of_model() -> list[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of the fields of NormFreeConfig, from its text: importing it loads torch."""
    return _MODEL_FIELD.findall(_MODEL.read_text(encoding="utf-8"))


def describe_keys(kind: type) -> dict[str, tuple[Any, str]]:
    """Default and meaning of every dotted key of a dataclass, e.g. `train.steps` of RunSpec."""
    schema = TypeAdapter(kind).json_schema()
    keys = {}
    for name, facts in schema["properties"].items():
        part = facts.get("$ref") or facts.get("items", {}).get("$ref")
        inner = schema["$defs"][part.rpartition("/")[2]]["properties"] if part else {}
        keys |= {f"{name}.{key}": about for key, about in inner.items()} or {name: facts}
    rows = {}
    for key, about in keys.items():
        meaning = about.get("description", "")
        if choices := about.get("enum") or about.get("items", {}).get("enum"):
            meaning += f" [{' | '.join(map(str, choices))}]"
        rows[key] = about.get("default"), meaning
    return rows


def nearest(word: str, allowed: list[str]) -> str:
    """The end of an error line: what was probably meant, else all that is allowed."""
    close = get_close_matches(word, allowed, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"allowed: {', '.join(allowed)}"
