"""Functions of Python files, and what `ast` says of a text."""

import ast
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field

from normfree.data.docstrings import parse

SHORTEST, LONGEST = 80, 400  # characters of a function: a window of 128 tokens holds about 400 characters of code


@dataclass(frozen=True)
class Function:
    """One function in ASCII, from `def` on, without indentation and decorators."""

    text: str
    file: int  # number of the file it is from
    node: ast.FunctionDef = field(compare=False)  # its syntax tree; places count within `text`

    def place(self, line: int, column: int) -> int:
        """Where in the text a line (from 1) and column lie."""
        return sum(len(text) + 1 for text in self.text.split("\n")[: line - 1]) + column


def functions_of(documents: Iterable[str]) -> list[Function]:
    """Functions of `SHORTEST` to `LONGEST` characters, each text once. Documents that are no Python have none."""
    functions: dict[str, Function] = {}
    for number, document in enumerate(documents):
        document = document.replace("\r\n", "\n")
        lines, tree = document.split("\n"), parse(document)
        for node in ast.walk(tree) if isinstance(tree, ast.Module) else ():
            if isinstance(node, ast.FunctionDef):
                text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"
                match parse(text) if SHORTEST <= len(text) <= LONGEST and text.isascii() else None:
                    case ast.Module(body=[ast.FunctionDef() as alone]):
                        functions.setdefault(text, Function(text, number, alone))
    return list(functions.values())
