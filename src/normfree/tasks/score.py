"""Log-likelihoods of whole texts under a model, an untrained copy of it and a unigram."""

# B texts, T tokens, V vocabulary

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from normfree.measures.held_out import LARGEST_LOGITS, measure_batches
from normfree.measures.perplexity import IGNORED, TokenLosses
from normfree.tasks.pairs import Pair

Rows = Sequence[Sequence[int]]
Scorer = Callable[[Rows], list[NDArray[np.float64]]]
"""Log-probabilities in nats of tokens 2 to the last of every row, each given the tokens before it."""
Encode = Callable[[str], tuple[list[int], Any]]
"""Token ids of a text, and the place in it where each token ends (None if the tokenizer does not say)."""


def log_likelihoods(model: PreTrainedModel, rows: Rows) -> list[NDArray[np.float64]]:
    """A `Scorer` of a causal model. Shorter rows are padded behind their end, which no token of theirs sees."""
    most_tokens = LARGEST_LOGITS // model.config.get_text_config().vocab_size
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    batches, start = [], 0
    while start < len(order):
        end = start + max(1, most_tokens // len(rows[order[start]]))
        texts = [torch.tensor(rows[number]) for number in order[start:end]]
        labels_BT = pad_sequence(texts, batch_first=True, padding_value=IGNORED)
        batches.append({"input_ids": pad_sequence(texts, batch_first=True), "labels": labels_BT})
        start = end
    losses = TokenLosses(model)
    measure_batches(model, batches, [losses], progress="evaluating")
    return [-losses.rows[place] for place in np.argsort(order)]


def unigram(counts_V: NDArray[np.int64]) -> Scorer:
    """A `Scorer` by the add-one smoothed counts of training tokens."""
    log_V = np.log((counts_V + 1) / (counts_V.sum() + len(counts_V)))
    return lambda rows: [log_V[np.asarray(row[1:])] for row in rows]


def untrained_copy(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same config with random weights from `seed`, on the same device."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh: Any = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    return fresh.to(model.device).eval()


def _shared_length(row: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens with which both rows begin."""
    return next((n for n, (a, b) in enumerate(zip(row, other, strict=False)) if a != b), min(len(row), len(other)))


def shared_window(good: list[int], bad: list[int], room: int) -> tuple[list[int], list[int]] | None:
    """Both rows, cut to `room` at their common end, then beginning, a quarter of it left of each; None if too long."""
    first = _shared_length(good, bad)
    last = _shared_length(good[first:][::-1], bad[first:][::-1])
    over, kept = max(0, max(len(good), len(bad)) - room), max(1, room // 4)
    end = min(over, max(0, last - kept))
    start = min(over - end, max(0, first - kept))
    if end + start < over or first == 0:
        return None
    return good[start : len(good) - end], bad[start : len(bad) - end]


def score_pairs(pairs: Sequence[Pair], encode: Encode, scorers: Mapping[str, Scorer], room: int) -> dict[str, Any]:
    """Nats of the good text less those of the bad one, by scorer, without long twos. Raises ValueError if all are."""
    windows = [shared_window(encode(pair.good)[0], encode(pair.bad)[0], room) for pair in pairs]
    twos = [(one, other) for one, other in zip(windows[::2], windows[1::2], strict=True) if one and other]
    if not twos:
        raise ValueError(f"the difference of no pair fits {room} tokens: give a longer context=")
    rows = [row for two in twos for window in two for row in window]
    values = {}
    for name, scorer in scorers.items():
        sums = np.array([nats.sum() for nats in scorer(rows)]).reshape(-1, 2)
        values[name] = (sums[:, 0] - sums[:, 1]).tolist()
    return {"unit": "nats", "left_out": len(pairs) - 2 * len(twos), "values": values}


def score_solutions(
    problems: Sequence[tuple[str, str]], encode: Encode, scorers: Mapping[str, Scorer], room: int
) -> dict[str, Any]:
    """Bits of each solution behind its prompt, by scorer, and its bytes.

    A token that is partly prompt counts whole, with all its bytes. Long texts advance by half a window, so that every
    token sees at least half a window of what is before it. Raises ValueError if the tokenizer gives no offsets.
    """
    rows, owners, sizes = [], [], []
    for number, (prompt, solution) in enumerate(problems):
        ids, ends = encode(prompt + solution)
        if ends is None:
            raise ValueError("humaneval needs a tokenizer with offsets (a fast one)")
        first = next(place for place, end in enumerate(ends) if end > len(prompt))
        sizes.append(len((prompt + solution)[ends[first - 1] :].encode()))
        for start in range(first, len(ids), room // 2):
            end = min(start + room // 2, len(ids))
            rows.append(ids[max(0, end - room) : end])
            owners.append((number, end - start))
    values = {}
    for name, scorer in scorers.items():
        bits = np.zeros(len(problems))
        for (number, count), nats in zip(owners, scorer(rows), strict=True):
            bits[number] -= nats[-count:].sum() / np.log(2)
        values[name] = bits.tolist()
    return {"unit": "bits", "left_out": 0, "values": values, "bytes": sizes}
