"""Labelled texts, against `ast`, labels by hand and sums by hand."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict

import pytest
from tokenizers import decoders

from normfree.measures.perplexity import IGNORED
from normfree.tasks.functions import Function, functions_of
from normfree.tasks.labels import CLASSES, Labelled, labelled_texts, right_labels, usual_labels
from tests.measures.byte_model import byte_tokenizer

CODE = '''def area(a, b=12):
    """Some size."""
    if a is None:  # no a
        return b**2
    return a + " b"
'''
TYPES = "kkk.nnnnono.noddoo.....ssssssssssssssss.....kk.n.kk.kkkko..cccccc.........kkkkkk.nood.....kkkkkk.n.o.ssss."
"""The type of each character of `CODE`, by hand."""
LETTERS = {"comment": "c", "keyword": "k", "name": "n", "number": "d", "operator": "o", "string": "s", "space": "."}


def is_valid(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def test_syntax_labels_are_what_ast_says(functions: list[Function]) -> None:
    tokenizer = byte_tokenizer()
    texts = labelled_texts("syntax_error", functions, tokenizer, 300)
    assert {label for text in texts for label in text.labels[:-1]} == {IGNORED}
    for text in texts:
        code = decoders.ByteLevel().decode(tokenizer.convert_ids_to_tokens(text.input_ids))
        said = "valid" if is_valid(code) else "error"
        assert CLASSES["syntax_error"][text.labels[-1]] == said


def test_no_token_is_more_frequent_in_errors(functions: list[Function]) -> None:
    counts: defaultdict[int, list[Counter[int]]] = defaultdict(lambda: [Counter(), Counter()])
    for text in labelled_texts("syntax_error", functions, byte_tokenizer(), 300):
        counts[text.item][text.labels[-1]].update(text.input_ids)
    assert len(counts) > 20
    assert all(valid == errors for valid, errors in counts.values())


def test_items_that_do_not_fit_are_left_out_whole(functions: list[Function]) -> None:
    everything = labelled_texts("syntax_error", functions, byte_tokenizer(), 401)
    fitting = labelled_texts("syntax_error", functions, byte_tokenizer(), 200)
    assert max(len(text.input_ids) for text in fitting) <= 200
    assert 0 < len(fitting) < len(everything)
    assert set(Counter(text.item for text in fitting).values()) == {4}


def test_token_types_are_those_found_by_hand() -> None:
    (function,) = functions_of([CODE])
    (text,) = labelled_texts("token_type", [function], byte_tokenizer(), 300)
    assert text.labels[0] == IGNORED
    assert "".join(LETTERS[CLASSES["token_type"][label]] for label in text.labels[1:]) == TYPES[1:]


@pytest.mark.parametrize("task", CLASSES)
def test_no_functions_are_refused(task: str) -> None:
    with pytest.raises(ValueError, match="of 0 held-out functions no text has at most"):
        labelled_texts(task, [], byte_tokenizer(), 128)


def test_usual_labels_and_right_ones_are_counted() -> None:
    texts = [Labelled([5, 6, 7], [IGNORED, 1, 0], 3), Labelled([6, 7, 7], [IGNORED, 1, 1], 3), Labelled([6], [1], 9)]
    assert usual_labels(texts) == (1, {6: 1, 7: 1})
    assert right_labels(texts, [[1, 1, 1], [IGNORED, 0, 1], [0]]) == [2, 0]
