"""Pairs are what their tasks claim, mirrored, reproducible, and at chance for a unigram; labels are those by hand."""

import argparse
import ast
import hashlib
import inspect
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import nullcontext
from pathlib import Path
from random import Random

import numpy as np
import pytest
from tokenizers import decoders

from normfree.data.installed import InstalledSource
from normfree.data.tokenizer import Encoder, train_tokenizer
from normfree.measures.perplexity import IGNORED
from normfree.spec.run import DataSpec
from normfree.tasks.functions import LONGEST, SHORTEST, Function, functions_of
from normfree.tasks.labels import CLASSES, Labelled, labelled_texts, right_labels, usual_labels
from normfree.tasks.pairs import PAIR_TASKS, make_pairs
from normfree.tasks.score import score_pairs, unigram
from tests.measures.byte_model import byte_tokenizer

EVERY = pytest.mark.parametrize("task", PAIR_TASKS)


@EVERY
def test_texts_differ_in_one_piece_and_are_mirrored(task: str, functions: list[Function]) -> None:
    pairs = make_pairs(task, functions, count=60)
    assert 10 <= len(pairs) <= 60
    assert len({pair.good for pair in pairs}) == len(pairs)
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        assert (one.right, one.wrong) == (other.wrong, other.right)
    for good, bad, right, wrong in pairs:
        places = [place for place in range(len(good)) if good.startswith(right, place)]
        assert bad in {good[:place] + wrong + good[place + len(right) :] for place in places} - {good}


@EVERY
def test_bad_texts_are_what_their_task_claims(task: str, functions: list[Function]) -> None:
    errors = {"keyword": SyntaxError, "bracket": SyntaxError, "indentation": IndentationError}
    for pair in make_pairs(task, functions, count=60):
        good = ast.dump(ast.parse(pair.good))
        with pytest.raises(errors[task]) if task in errors else nullcontext():
            assert ast.dump(ast.parse(pair.bad)) != good
        if task == "name":
            assert not re.search(rf"\b{pair.wrong.strip()}\b", pair.good)
            assert len(re.findall(rf"\b{pair.right.strip()}\b", pair.good)) >= 2


def test_only_code_is_edited_not_strings() -> None:
    text = 'def f(x):\n    """(if) [for] {in}: a docstring of more than eighty characters."""\n    x = "(["  # ) ]\n'
    (function,) = functions_of([text])
    (brackets, _), (keywords, _) = PAIR_TASKS["bracket"], PAIR_TASKS["keyword"]
    ((_, edits),) = brackets([function], Random(0))
    assert {function.text[slice(*span)] for span, _ in edits} == {"(", "):"}
    assert list(keywords([function], Random(0))) == [(function, [])]


@EVERY
def test_a_unigram_is_at_chance(task: str, documents: list[str], functions: list[Function]) -> None:
    tokenizer = train_tokenizer(documents, 600)
    encoder = Encoder(tokenizer)
    counts_V = np.bincount(np.concatenate(encoder.encode(documents)).ravel(), minlength=600)

    def encode(text: str) -> tuple[list[int], None]:
        return encoder.encode([text])[0].ravel().tolist(), None

    pairs = make_pairs(task, functions, count=400)
    margins = np.array(score_pairs(pairs, encode, {"unigram": unigram(counts_V)}, 10**6)["values"]["unigram"])
    accuracy = np.mean((margins > 0) + 0.5 * (margins == 0))
    assert abs(accuracy - 0.5) <= 2 * np.sqrt(0.25 / len(margins))
    assert np.abs(margins).max() > 0.5  # it is not at chance because it sees no difference
    assert abs(margins.mean()) < 0.02 * np.abs(margins).mean()


def test_seed_and_count_decide_the_pairs(functions: list[Function]) -> None:
    first = make_pairs("bracket", functions, seed=1, count=20)
    assert first == make_pairs("bracket", functions, seed=1, count=20)
    assert first != make_pairs("bracket", functions, seed=2, count=20)
    assert len(make_pairs("bracket", functions, count=7)) == 6


def digest() -> str:
    functions = functions_of([inspect.getsource(module) for module in (argparse, inspect)])
    pairs = [make_pairs(task, functions, count=20) for task in PAIR_TASKS]
    return hashlib.sha256(repr(pairs).encode()).hexdigest()


@pytest.mark.slow
def test_pairs_do_not_depend_on_the_hash_seed() -> None:
    command = [sys.executable, "-c", "from tests.tasks.test_pairs import digest; print(digest())"]
    environment, root = os.environ | {"PYTHONHASHSEED": "1"}, Path(__file__).parents[2]
    assert subprocess.check_output(command, env=environment, cwd=root, text=True).strip() == digest()


def test_functions_are_whole_short_and_without_decorators(documents: list[str], functions: list[Function]) -> None:
    assert len(functions) > 50
    for function in functions:
        assert function.text.startswith("def ")
        assert SHORTEST <= len(function.text) <= LONGEST
    assert functions_of(["no python (", "x = '\0'", "def f(): pass\n"]) == []
    assert functions_of([documents[0].replace("\n", "\r\n")]) == functions_of(documents[:1])


@pytest.mark.slow
def test_this_machine_has_two_thousand_minimal_pairs() -> None:
    documents = list(InstalledSource(DataSpec()).documents("validation", Counter()))
    functions = functions_of(documents)
    counts = [len(make_pairs(task, functions)) for task in ("keyword", "indentation", "bracket", "name")]
    assert counts == [500] * 4


CODE = '''def area(a, b=12):
    """Some size."""
    if a is None:  # no a
        return b**2
    return a + " b"
'''
TYPES = "kkk.nnnnono.noddoo.....ssssssssssssssss.....kk.n.kk.kkkko..cccccc.........kkkkkk.nood.....kkkkkk.n.o.ssss."
"""The type of each character of `CODE`, by hand."""
LETTERS = {"comment": "c", "keyword": "k", "name": "n", "number": "d", "operator": "o", "string": "s", "space": "."}


def test_syntax_labels_are_what_ast_says(functions: list[Function]) -> None:
    tokenizer = byte_tokenizer()
    texts = labelled_texts("syntax_error", functions, tokenizer, 300)
    assert {label for text in texts for label in text.labels[:-1]} == {IGNORED}
    for text in texts:
        code = decoders.ByteLevel().decode(tokenizer.convert_ids_to_tokens(text.input_ids))
        with pytest.raises(SyntaxError) if CLASSES["syntax_error"][text.labels[-1]] == "error" else nullcontext():
            ast.parse(code)


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


def test_usual_labels_and_right_ones_are_counted() -> None:
    texts = [Labelled([5, 6, 7], [IGNORED, 1, 0], 3), Labelled([6, 7, 7], [IGNORED, 1, 1], 3), Labelled([6], [1], 9)]
    assert usual_labels(texts) == (1, {6: 1, 7: 1})
    assert right_labels(texts, [[1, 1, 1], [IGNORED, 0, 1], [0]]) == [2, 0]


def test_too_little_text_is_said() -> None:
    with pytest.raises(ValueError, match=r"task keyword: 0 functions give no pair \(items=500\)"):
        make_pairs("keyword", functions_of(["x = 1\n"]))
    for task in CLASSES:
        with pytest.raises(ValueError, match="of 0 held-out functions no text has at most"):
            labelled_texts(task, [], byte_tokenizer(), 128)
