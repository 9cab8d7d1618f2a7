"""From Hydra's YAML and the user's `key=value` to a checked RunSpec. Nothing behind this file sees OmegaConf."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normfree.config import RunSpec, known_keys, nearest

CONF = Path(__file__).parent / "conf"
GROUPS = ("data", "preset", "variant")
PLACES = ("runs_dir", "cache_dir")


@dataclass(frozen=True)
class Composed:
    """A run and where it is to be put."""

    spec: RunSpec
    runs_dir: Path
    cache_dir: Path | None


def compose_run(overrides: Sequence[str]) -> Composed:
    """Compose the configuration with `key=value` overrides, the last one winning.

    Raises ValueError, with the nearest valid names, for an unknown key, group member or value.
    """
    with initialize_config_dir(str(CONF), version_base=None):
        try:
            composed = compose("config", [forced(text) for text in checked(overrides)])
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(str(error).strip().splitlines()[0]) from error
    return from_hydra(composed)


def from_hydra(composed: DictConfig) -> Composed:
    """Plain, checked values from what Hydra composed."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    places = {name: values.pop(name) for name in PLACES}
    return Composed(
        spec=RunSpec.from_dict(values),
        runs_dir=Path(places["runs_dir"]),
        cache_dir=Path(places["cache_dir"]) if places["cache_dir"] else None,
    )


def checked(overrides: Sequence[str]) -> list[str]:
    """The overrides, or ValueError for a key or a group member that does not exist."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is not of the form key=value")
        if key.startswith("hydra"):
            continue
        if key in GROUPS:
            for member in value.split(","):
                if member not in members(key):
                    raise ValueError(f"unknown {key} {member!r}; {nearest(member, members(key))}")
        elif key not in allowed_keys():
            raise ValueError(f"unknown key {key!r}; {nearest(key, allowed_keys())}")
        try:
            OverridesParser.create().parse_override(text)
        except HydraException:
            raise ValueError(f"cannot read {text!r}; quote values with special characters: \"{key}='...'\"") from None
    return list(overrides)


def forced(override: str) -> str:
    """Let an override of a nested key add what the YAML leaves at its default, e.g. `++model.bias=all`."""
    key = override.partition("=")[0]
    return f"++{override}" if "." in key and not key.startswith("hydra") else override


def members(group: str) -> list[str]:
    """The members of a configuration group, e.g. the presets; of `studies`, those that come with the package."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def describe_model_keys() -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every field of NormFreeConfig, read off its source: importing it loads torch."""
    source = (Path(__file__).parent / "model" / "configuration.py").read_text()
    body = next(node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    rows = []
    for line, after in itertools.pairwise(body):
        match line, after:
            case ast.AnnAssign(ast.Name(name), value=ast.expr() as default), ast.Expr(ast.Constant(str(meaning))):
                rows.append((f"model.{name}", str(ast.literal_eval(default)), meaning))
            case ast.AnnAssign(ast.Name(name), value=ast.expr() as default), _:
                rows.append((f"model.{name}", str(ast.literal_eval(default)), ""))
    return rows


def allowed_keys() -> list[str]:
    """Every key a user may set."""
    from normfree.model import NormFreeConfig  # loads torch, which --help and report do not need

    spec_keys = [key for key in known_keys() if key not in ("model", "preset", "variant", "label")]
    return [*GROUPS, *PLACES, *spec_keys, *(f"model.{name}" for name in NormFreeConfig.__annotations__)]
