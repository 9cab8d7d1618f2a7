"""The rooms of the house import each other in one direction only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "normfree"

# room -> rooms it may import. Rooms that are missing here may import nothing of ours.
ALLOWED = {
    "config": {"manifest"},
    "records": {"manifest", "config"},
    "data": {"manifest", "config"},
    "convert": {"model"},
    "training": {"manifest", "config", "data", "model", "entropy", "evaluate", "records", "signals"},
    "workers": {"signals"},
    "analysis": {"config", "records"},
    "tables": {"records", "analysis", "published"},
    "plots": {"records", "analysis", "published"},
    "cost": {"config", "records", "analysis", "tables"},
    "report": {"manifest", "records", "analysis", "published", "tables", "plots", "cost"},
    "compose": {"config", "model"},
    "pretrained": {"config", "model", "records"},
    "measure": {"entropy", "evaluate"},
    "studies": {"analysis", "compose", "config", "data", "records", "report", "training", "workers"},
    "sweep": {"compose", "records", "studies", "training"},
    "verify": {"manifest", "config", "data", "records", "training"},
    "simulate": {"cost", "measure", "pretrained", "records"},
    "commands": None,
    "cost_commands": None,
    "model_commands": None,
    "cli": None,
}
WITHOUT_TORCH = ("manifest", "config", "records", "analysis", "published", "tables", "plots", "report", "cost")


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a file imports anywhere in it; annotations-only imports count too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("normfree.") and name.count(".")}
    rooms = {room_of(file) for file in SOURCE.rglob("*.py")}
    return (found & rooms) - {room_of(path)}


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


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
