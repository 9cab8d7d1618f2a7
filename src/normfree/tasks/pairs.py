"""Pairs of texts that differ in one piece, in mirrored twos: (x is right, y is wrong), then (y is right, x is wrong).

A piece is what byte-level tokenizers encode apart from its surroundings: a word with the blank before it, a whole run
of punctuation, or the white space before a line. So both texts of a mirror trade the same tokens, and the margins of
a unigram sum to 0 over the two: it is right on one of them.
"""

import ast
import io
import keyword
import re
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from normfree.data.docstrings import parse
from normfree.tasks.functions import Function

_KEYWORDS = sorted({*keyword.kwlist} - {"True", "False", "None", "async", "await", "nonlocal"})
_BRACKETS = dict.fromkeys("([{", "([{") | dict.fromkeys(")]}", ")]}")
_PUNCTUATION = re.compile(r" ?(?:[^\s\w]|_)+")
_NAME = re.compile(r"[A-Za-z](\w*[A-Za-z0-9])?", re.ASCII)
Span = tuple[int, int]
Edit = tuple[Span, str]  # a piece of a function and what may replace it


class Pair(NamedTuple):
    """Two texts; `wrong` stands in the bad one where `right` stands in the good one."""

    good: str
    bad: str
    right: str
    wrong: str


def make_pairs(task: str, functions: Sequence[Function], *, seed: int = 0, count: int = 500) -> list[Pair]:
    """At most `count` pairs, mirrored twos behind each other; a function is in one of them at most.

    Every bad text is to `ast` what its task claims. Functions, seed and count decide the pairs (and Python's version,
    which tokenizes). Raises ValueError if the functions give none.
    """
    edits_of, claim = PAIR_TASKS[task]
    random = Random(f"{seed}:{task}")
    waiting: dict[tuple[str, str], list[tuple[Function, Span]]] = defaultdict(list)
    pairs: list[Pair] = []
    used: set[Function] = set()
    for function, edits in edits_of(random.sample(functions, len(functions)), random):
        if len(pairs) + 2 > count:
            break
        edits = random.sample(edits, len(edits))
        for span, wrong in edits:
            pair = _replaced(function, span, wrong)
            mirrors = waiting[wrong, pair.right]
            if mirrors and isinstance(parse(pair.bad), claim):
                while mirrors and function not in used:
                    other, place = mirrors.pop()
                    mirror = _replaced(other, place, pair.right)
                    if other not in used and isinstance(parse(mirror.bad), claim):
                        pairs += [mirror, pair]
                        used |= {other, function}
            if function in used:
                break
        else:
            for span, wrong in edits:
                waiting[function.text[slice(*span)], wrong].append((function, span))
    if not pairs:
        raise ValueError(f"task {task}: {len(functions)} functions give no pair (items={count}); give more text")
    return pairs


def _replaced(function: Function, span: Span, wrong: str) -> Pair:
    text, (start, end) = function.text, span
    return Pair(text, f"{text[:start]}{wrong}{text[end:]}", text[start:end], wrong)


def _keywords(function: Function, random: Random) -> Iterator[Edit]:
    for token, span in tokens_of(function):
        if token.string in _KEYWORDS and span[0]:
            start, end = _with_blank(function, span)
            others = random.sample(_KEYWORDS, 8)
            yield from (((start, end), " " * (start < span[0]) + other) for other in others if other != token.string)


def _brackets(function: Function, random: Random) -> Iterator[Edit]:
    runs = [match.span() for match in _PUNCTUATION.finditer(function.text)]
    for token, (place, _) in tokens_of(function):
        if token.type == tokenize.OP and token.string in _BRACKETS:
            start, end = next(run for run in runs if run[0] <= place < run[1])
            before, after = function.text[start:place], function.text[place + 1 : end]
            others = _BRACKETS[token.string].replace(token.string, "")
            yield from (((start, end), f"{before}{other}{after}") for other in others)


def _indentations(function: Function, random: Random) -> Iterator[Edit]:
    for blank in re.finditer(r"\s*\n *(?=\S)", function.text):
        yield blank.span(), f"{blank[0]}    "
        if blank[0].endswith(" " * 5):  # the line is indented afterwards, too
            yield blank.span(), blank[0][:-4]


def _local_names(function: Function) -> Iterator[Span]:
    """One use of each parameter and local variable that the text mentions before."""
    nodes = list(ast.walk(function.node))
    uses = {node.id: node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    local = {node.arg for node in nodes if isinstance(node, ast.arg)}
    local |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for name, node in uses.items():
        start = function.place(node.lineno, node.col_offset)
        if name in local and _NAME.fullmatch(name) and re.search(rf"\b{name}\b", function.text[:start]):
            yield _with_blank(function, (start, start + len(name)))


def _function_name(function: Function) -> Iterator[Span]:
    """The name behind `def`, if the text has it nowhere else."""
    name = function.node.name
    if len(re.findall(rf"\b{name}\b", function.text)) == 1:
        yield 3, 4 + len(name)


def _docstring(function: Function) -> Iterator[Span]:
    """The text of a docstring of one line, if there is more than it in the function."""
    docstring = re.search(r'\n +"""([^"\\\n]{15,})"""\n', function.text)
    if docstring and ast.get_docstring(function.node) == docstring[1] and len(function.node.body) > 1:
        yield docstring.span(1)


EditsOfAll = Callable[[Sequence[Function], Random], Iterator[tuple[Function, list[Edit]]]]


def _each(edits: Callable[[Function, Random], Iterator[Edit]]) -> EditsOfAll:
    """Edits that a function alone decides."""
    return lambda functions, random: ((function, list(edits(function, random))) for function in functions)


def _swaps(spans: Callable[[Function], Iterator[Span]]) -> EditsOfAll:
    """Pieces of other functions of the same file that the text does not have."""

    def of_all(functions: Sequence[Function], random: Random) -> Iterator[tuple[Function, list[Edit]]]:
        of_file: dict[int, set[str]] = defaultdict(set)
        for function in functions:
            of_file[function.file] |= {function.text[slice(*span)] for span in spans(function)}
        for function in functions:
            words = set(re.findall(r"\w+", function.text))  # in comments and strings too
            edits = [
                (span, other)
                for span in spans(function)
                for other in sorted(of_file[function.file])
                if other.strip() not in words
                and other.startswith(" ") == function.text[span[0]].isspace()
                and other != function.text[slice(*span)]
            ]
            yield function, edits

    return of_all


PAIR_TASKS: dict[str, tuple[EditsOfAll, type]] = {
    "keyword": (_each(_keywords), SyntaxError),
    "indentation": (_each(_indentations), IndentationError),
    "bracket": (_each(_brackets), SyntaxError),
    "name": (_swaps(_local_names), ast.Module),
    "docstring": (_swaps(_docstring), ast.Module),
    "function_name": (_swaps(_function_name), ast.Module),
}
"""Edits of a task, and what `parse` says of the bad text: an error, or a module."""


def tokens_of(function: Function) -> Iterator[tuple[tokenize.TokenInfo, Span]]:
    """Python's tokens, and where each lies in the text."""
    for token in tokenize.generate_tokens(io.StringIO(function.text).readline):
        start = function.place(*token.start)
        yield token, (start, start + len(token.string))


def _with_blank(function: Function, span: Span) -> Span:
    return span[0] - (function.text[span[0] - 1] == " "), span[1]
