"""Functions with labels to fine-tune on: whether a text has a syntax error, and the type of each token."""

import keyword
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from normfree.measures.perplexity import IGNORED
from normfree.tasks.functions import Function
from normfree.tasks.pairs import make_pairs, tokens_of

TYPES = ("comment", "keyword", "name", "number", "operator", "string", "space")
CLASSES = {"syntax_error": ("valid", "error"), "token_type": TYPES}
"""Classes of an objective, in the order of their labels."""
_TYPES = {tokenize.NUMBER: "number", tokenize.OP: "operator", tokenize.COMMENT: "comment", tokenize.NAME: "name"}


class Labelled(NamedTuple):
    """The tokens of a text and the label of each, `IGNORED` where there is none."""

    input_ids: list[int]
    labels: list[int]
    item: int  # texts of one item are not independent


def labelled_texts(task: str, functions: Sequence[Function], tokenizer: Any, context: int) -> list[Labelled]:
    """The texts of a task, without items that have one of more than `context` tokens.

    `syntax_error` labels the last token of the texts of `make_pairs`, whose classes differ in no token's frequency.
    `token_type` labels each token but the first with the kind of token it begins in. Raises ValueError for no text.
    """
    make = _syntax_errors if task == "syntax_error" else _token_types
    texts = list(make(functions, tokenizer)) if functions else []
    long = {text.item for text in texts if len(text.input_ids) > context}
    if fitting := [text for text in texts if text.item not in long]:
        return fitting
    missing = f"of {len(functions)} held-out functions no text has at most data.context={context} tokens"
    raise ValueError(f"train.objective={task}: {missing}; give three or more held-out files of Python code")


def _syntax_errors(functions: Sequence[Function], tokenizer: Any) -> Iterator[Labelled]:
    kinds = ("keyword", "indentation", "bracket")
    pairs = [pair for kind in kinds for pair in make_pairs(kind, functions, count=len(functions))]
    for number, pair in enumerate(pairs):
        for label, text in enumerate((pair.good, pair.bad)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            yield Labelled(ids, [IGNORED] * (len(ids) - 1) + [label], number // 2)


def _token_types(functions: Sequence[Function], tokenizer: Any) -> Iterator[Labelled]:
    for number, function in enumerate(functions):
        types = ["space"] * len(function.text)
        for token, (start, end) in tokens_of(function):
            if token.string.strip():
                is_keyword = token.type == tokenize.NAME and keyword.iskeyword(token.string)
                kind = "keyword" if is_keyword else _TYPES.get(token.type, "string")
                types[start:end] = [kind] * (end - start)
        encoding = tokenizer(function.text, add_special_tokens=False, return_offsets_mapping=True)
        labels = []
        for start, end in encoding["offset_mapping"]:
            letters = function.text[start:end].lstrip()  # a word has the blank before it
            labels.append(TYPES.index(types[end - len(letters) if letters else start] if start < end else "space"))
        yield Labelled(encoding["input_ids"], [IGNORED, *labels[1:]], number)


def usual_labels(texts: Sequence[Labelled]) -> tuple[int, dict[int, int]]:
    """The most frequent label, and that of each token."""
    pairs = [pair for text in texts for pair in zip(*text[:2], strict=True) if pair[1] != IGNORED]
    [(most, _)] = Counter(label for _, label in pairs).most_common(1)
    return most, dict(pair for pair, _ in reversed(Counter(pairs).most_common()))  # the last of a token counts


def right_labels(texts: Sequence[Labelled], predicted: Sequence[Sequence[int]]) -> list[int]:
    """How many labels of each item are predicted."""
    right: Counter[int] = Counter()
    for text, labels in zip(texts, predicted, strict=True):
        right[text.item] += sum(a == b != IGNORED for a, b in zip(text.labels, labels, strict=True))
    return list(right.values())
