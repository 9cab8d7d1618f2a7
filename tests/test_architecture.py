"""The rooms of the house import each other in one direction only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import normfree

SOURCE = Path(__file__).parents[1] / "src" / "normfree"

# room -> rooms it may import. Rooms that are missing here may import nothing of ours.
ALLOWED = {
    "config": {"manifest"},
    "store": {"records"},
    "records": {"manifest", "config", "store"},
    "data": {"manifest", "config"},
    "convert": {"model"},
    "measures": {"config", "entropy", "store", "plots"},  # a measurement draws itself
    "evaluate": {"measures"},
    "training": {"manifest", "config", "data", "model", "measures", "evaluate", "records", "signals", "store"},
    "workers": {"signals"},
    "analysis": {"config", "published", "records", "store"},
    "tables": {"records", "analysis", "published"},
    "plots": {"records", "analysis", "published", "store"},
    "cost": {"config", "records", "analysis", "tables"},
    "report": {"manifest", "records", "analysis", "published", "tables", "plots", "cost", "store"},
    "compose": {"config", "measures", "model"},
    "pretrained": {"config", "gguf_file", "model", "records"},
    "windows": {"entropy", "evaluate"},
    "studies": {"analysis", "compose", "config", "data", "records", "report", "training", "workers"},
    "sweep": {"compose", "records", "studies", "training"},
    "verify": {"manifest", "config", "data", "records", "training"},
    "commands": None,
    "cost_commands": None,
    "model_commands": None,
    "cli": None,
}
WITHOUT_TORCH = ("manifest", "config", "store", "records", "analysis", "published", "tables", "plots", "report", "cost")


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a file imports anywhere in it; annotations-only imports count too."""
    package = ("normfree", *path.relative_to(SOURCE).parent.parts)
    return rooms_named_in(path.read_text(), package) - {room_of(path)}


def rooms_named_in(code: str, package: tuple[str, ...]) -> set[str]:
    """`package`: that of the file, from which its relative imports count."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        else:
            continue
        names = [normfree._DOORS.get(name.removeprefix("normfree."), name) for name in names]
        found |= {name.split(".")[1] for name in names if name.startswith("normfree.")}
    return found & ROOMS


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]
ROOMS = {room_of(path) for path in FILES}


def test_every_rule_is_of_a_room_that_is_there() -> None:
    assert ALLOWED.keys() <= ROOMS
    assert set().union(*filter(None, ALLOWED.values())) <= ROOMS


@pytest.mark.parametrize(
    ("code", "room"),
    [
        ("import normfree.training.train", "training"),
        ("from normfree.training import train", "training"),
        ("from normfree import training", "training"),
        ("from normfree import train", "training"),
        ("from normfree import load_runs as read", "records"),
        ("from .. import training", "training"),
        ("from ..training.train import train", "training"),
        ("from .. import train", "training"),
        ("from . import packing", "data"),
        ("from .packing import pack", "data"),
        ("import normfree\nnormfree.train(spec)", "training"),
        ("def late():\n    from normfree import train", "training"),
    ],
)
def test_no_way_to_write_an_import_goes_round_the_rules(code: str, room: str) -> None:
    assert rooms_named_in(code, ("normfree", "data")) == {room}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_room_imports_only_rooms_before_it_in_the_flow(path: Path) -> None:
    allowed = ALLOWED.get(room_of(path), set())
    if allowed is not None:
        assert imported_rooms(path) <= allowed


def test_only_the_command_line_knows_the_commands() -> None:
    importers = {
        room_of(path) for path in FILES if {"commands", "cost_commands", "model_commands", "cli"} & imported_rooms(path)
    }
    assert importers <= {"cli", "cost_commands", "model_commands"}


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_everything_behind_records_works_without_torch(room: str) -> None:
    files = [path for path in FILES if room_of(path) == room]
    imported = {
        name.split(".")[0]
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert files
    assert not imported & {"torch", "transformers", "datasets", "accelerate"}


def test_the_model_room_travels_alone() -> None:
    files = [path for path in FILES if room_of(path) == "model"]
    allowed = {
        "torch",
        "transformers",
        "huggingface_hub",
        "collections",
        "dataclasses",
        "difflib",
        "types",
        "typing",
    }
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed | {"math", "functools"}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in allowed | {"__future__", "math", "functools"}


def opens_text_in_the_locale_s_encoding(call: ast.Call) -> bool:
    keys = {keyword.arg for keyword in call.keywords}
    if "encoding" in keys or ast.unparse(call.func) == "os.open":
        return False
    if ast.unparse(call.func).endswith(("open", ".open")):
        return not any(isinstance(part, ast.Constant) and "b" in str(part.value) for part in call.args)
    of_path = isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text")
    return "text" in keys or (of_path and not (call.args and ast.unparse(call.args[0]) == "'RECORD'"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_every_text_file_and_process_has_an_encoding_of_ours(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert [ast.unparse(call) for call in calls if opens_text_in_the_locale_s_encoding(call)] == []
