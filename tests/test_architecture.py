"""The rooms of the house import each other in one direction only."""

import ast
import graphlib
from pathlib import Path

import pytest

import normfree

SOURCE = Path(__file__).parents[1] / "src" / "normfree"

# room -> rooms it may import; no room may be missing.
ALLOWED = {
    "files": "",
    "model": "",
    "entropy": "",
    "spec": "files model",
    "store": "files spec",
    "data": "files spec",
    "analysis": "spec store",
    "cost": "analysis spec store",
    "report": "analysis cost files spec store",
    "measures": "entropy report spec store",  # a measurement draws itself
    "pretrained": "data entropy model spec store",
    "tasks": "data files measures spec",
    "training": "analysis cost data files measures model report spec store tasks",
    "cli": "analysis cost data entropy files measures pretrained report spec store tasks training",
    "__main__": "cli",
}
WITHOUT_TORCH = ("files", "store", "analysis", "report", "cost")


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, for annotations only too, or takes from `normfree`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert (room_of(path), node.level) == ("model", 1), "relative imports stay inside, in a saved model too"
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "normfree":
            names.add(f"normfree.{node.attr}")
    return names


def imported_rooms(path: Path) -> set[str]:
    names = {normfree._PUBLIC.get(name.removeprefix("normfree."), name) for name in imports_of(path)}
    return ({name.split(".")[1] for name in names if name.startswith("normfree.")} & ROOMS) - {room_of(path)}


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]
ROOMS = {room_of(path) for path in FILES}


def test_every_room_has_a_rule_and_no_cycle() -> None:
    assert ALLOWED.keys() == ROOMS
    graphlib.TopologicalSorter({room: rooms.split() for room, rooms in ALLOWED.items()}).prepare()
    assert len(list(SOURCE.glob("*.py"))) <= 3, "files at the root"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_room_imports_only_rooms_before_it_in_the_flow(path: Path) -> None:
    assert imported_rooms(path) <= {*ALLOWED[room_of(path)].split()}


def packages_of(room: str) -> set[str]:
    return {name.split(".")[0] for path in FILES if room_of(path) == room for name in imports_of(path)}


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_everything_behind_records_works_without_torch(room: str) -> None:
    assert not packages_of(room) & {"torch", "transformers", "datasets", "accelerate"}


def test_the_model_room_travels_alone() -> None:
    third_party, standard = "torch transformers huggingface_hub", "collections copy dataclasses difflib types typing"
    assert packages_of("model") <= {*f"{third_party} {standard} __future__ functools math re".split()}


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


SIZED = [*FILES, *sorted(Path(__file__).parent.rglob("*.py"))]


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_files_have_400_lines_at_most_and_functions_60() -> None:
    assert [path.name for path in SIZED if len(path.read_text().splitlines()) > 400] == []
    long = [f.name for path in SIZED for f in functions(path) if (f.end_lineno or 0) - f.lineno >= 60]
    assert long == []


def test_names_of_tests_have_at_most_ten_words() -> None:
    names = [f.name for path in SIZED for f in functions(path) if f.name.startswith("test_")]
    assert [name for name in names if name.count("_") > 10] == []
