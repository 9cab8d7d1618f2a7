"""packing=docstring: which functions give a row, what its two parts say, and what is counted."""

import ast
import inspect
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from normfree.data.docstrings import sources_and_targets
from normfree.spec.run import DataSpec
from tests.data.prepare import make, token_ids

FORMS = '''
class Shape:
    @property
    def größe(self, unit="äöü"):
        """Size in metres.

        More of it."""  # measured

        # The sides first.
        return self.a * 2

    async def wait(self):
        """
        Wait for it."""
        @wraps
        def inner():
            "Inner words"; x = 1; return x
        return await inner()
def short(): ("One line"); return 1
def nothing(): """Only words."""
def blank(): " "; return 2
def again(): r"One \\d line"; return 1
'''


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_pairs_are_functions_and_their_docstrings(line_end: str) -> None:
    documents = [FORMS, inspect.getsource(inspect)]
    texts = [*sources_and_targets([text.replace("\n", line_end) for text in documents], Counter(), set())]
    expected = {}
    for node in [node for text in documents for node in ast.walk(ast.parse(text))]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.body[1:] and ast.get_docstring(node):
            line = str(ast.get_docstring(node)).splitlines()[0]
            node.body, node.decorator_list = node.body[1:], []
            expected[ast.dump(node)] = line
    pairs = {}
    for source, target in zip(texts[::2], texts[1::2], strict=True):
        [function] = ast.parse(source).body
        pairs[ast.dump(function)] = target
    assert pairs == expected
    assert {"Size in metres.", "Wait for it.", "Inner words", "One line", "One \\d line"} == {*texts[1:10:2]}
    assert "    # measured\n\n    # The sides first.\n" in "".join(texts)


@pytest.fixture
def functions(tmp_path: Path) -> DataSpec:
    """Forty functions, eight held out. To train on there are also one of these, one again, and two broken files."""
    texts = [f'def area_{n}(a):\n    """Area of é{" x" * n}\n    ."""\n    return a{" + 1" * n}\n' for n in range(40)]
    train = [*texts[:32], f"{texts[0]}1", f"{texts[39]}1", "def", "-" * 100_000 + "1"]
    for split, part in {"train": train, "held_out": texts[32:]}.items():
        (tmp_path / split).mkdir()
        for number, text in enumerate(part):
            (tmp_path / split / f"{number}.py").write_text(text)
    paths = {"paths": (str(tmp_path / "train"),), "validation_paths": (str(tmp_path / "held_out"),)}
    return DataSpec(source="files", **paths, vocab_size=300, context=64, packing="docstring")


def test_a_row_is_a_function_and_the_line_about_it(functions: DataSpec, tmp_path: Path) -> None:
    corpus = make(functions, tmp_path / "cache")
    tokenizer, facts, targets = corpus.tokenizer(), corpus.facts(), {}
    end: int = tokenizer.eos_token_id  # pyright: ignore[reportAssignmentType]
    for split, numbers in {"train": range(32), "validation": range(32, 40)}.items():
        targets[split], said = [], []
        for row in token_ids(corpus, split).tolist():
            source, target = (part[: part.index(end)] for part in (row[:48], row[48:]))
            assert row == [*source, *[end] * (48 - len(source)), *target, *[end] * (16 - len(target))]
            number = int(tokenizer.decode(source).partition("(")[0].removeprefix("def area_"))
            function = f"def area_{number}(a):\n    return a{' + 1' * number}"
            for part, text, room in ((source, function, 47), (target, f"Area of é{' x' * number}", 15)):
                assert tokenizer.decode(part) == text or (len(part) == room and text.startswith(tokenizer.decode(part)))
            targets[split] += [*target, end]
            said.append(number)
        assert sorted(said) == [*numbers]
        assert (facts[f"{split}_blocks"], facts[f"{split}_target_tokens"]) == (len(numbers), len(targets[split]))
    counts_V = np.bincount(targets["train"], minlength=300) + 1
    unigram = np.exp(-np.log(counts_V / counts_V.sum())[targets["validation"]].mean())
    assert facts["unigram_perplexity"] == pytest.approx(unigram)
    size = len(tokenizer.decode(targets["validation"], skip_special_tokens=True).encode())
    assert corpus.predicted_bytes().sum() == size == facts["bytes_per_token"] * len(targets["validation"])
    assert corpus.left_out("train") == "2 not Python"
    assert corpus.held_out_documents() is None


def test_text_without_docstrings_is_refused(functions: DataSpec, tmp_path: Path, text_folder: Path) -> None:
    message = r"the train text \(\d+ bytes\) has no function with a docstring; left out: nothing; give more text"
    with pytest.raises(ValueError, match=message):
        make(replace(functions, paths=(str(text_folder),)), tmp_path / "cache")
