"""Code to docstring: functions of Python files as sources, the first lines of their docstrings as targets.

Shapes: S tokens of a text, N rows, T tokens in a row, C columns as in `packing`.
"""

import ast
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import cast

import numpy as np

from normfree.data.sources import normalised_hash


def parse(text: str) -> ast.Module | Exception:
    """The syntax tree of a text, or what is wrong with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strings such as "\d"
        try:
            return ast.parse(text.removeprefix("\ufeff"))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # null bytes; nested too deep
            return error


def sources_and_targets(documents: Iterable[str], dropped: Counter[str], seen: set[bytes]) -> Iterator[str]:
    """Yield the text of each function, from `def` on and without its docstring, then the docstring's first line.

    Functions without a docstring or anything else are left out, and those whose hashes are in `seen`, which grows.
    `dropped` counts documents that are no Python.
    """
    for document in documents:
        tree = parse(document := re.sub("\r\n?", "\n", document))
        if not isinstance(tree, ast.Module):
            dropped["not Python"] += 1
            continue
        code = document.encode()
        starts = np.cumsum([0, *(len(line) + 1 for line in code.split(b"\n"))])  # of lines; ast counts bytes
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.body[1:]:
                continue
            docstring, place = ast.get_docstring(node), node.body[0]
            before = code[starts[node.lineno - 1] : starts[place.lineno - 1] + place.col_offset]
            end = starts[cast(int, place.end_lineno) - 1] + cast(int, place.end_col_offset)
            behind = code[end : starts[cast(int, node.end_lineno)]]
            source = textwrap.dedent((before + behind.lstrip(b" \t\f\n;")).decode().rstrip("\n"))
            if docstring and (digest := normalised_hash(source + docstring)) not in seen:
                seen.add(digest)
                yield source
                yield docstring.split("\n")[0]


def target_tokens(context: int) -> int:
    """The last quarter of a row is the target's."""
    return context // 4


def paired(texts: Iterable[np.ndarray], context: int, *, end: int) -> Iterator[np.ndarray]:
    """Put each source and the target after it, (S, C) both, into a row (1, T, C).

    Their tails are cut so that token `end` fits behind each; it also fills the rest. Only tokens of targets have bytes.
    """
    texts, start = iter(texts), context - target_tokens(context)
    for source_SC, target_SC in zip(texts, texts, strict=True):
        row_TC = np.zeros_like(source_SC, shape=(context, source_SC.shape[1]))
        row_TC[:, 0] = end
        source_SC, target_SC = source_SC[: start - 1], target_SC[: context - start - 1]
        row_TC[: len(source_SC), 0] = source_SC[:, 0]
        row_TC[start : start + len(target_SC)] = target_SC
        yield row_TC[None]


def target_ids(rows_NT: np.ndarray, *, end: int) -> np.ndarray:
    """All token ids of the targets of rows, the first `end` of each included."""
    targets_NT = rows_NT[:, -target_tokens(rows_NT.shape[1]) :]
    is_end_NT = targets_NT == end
    return targets_NT[is_end_NT.cumsum(axis=1) - is_end_NT == 0]
