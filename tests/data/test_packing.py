"""Packing loses and repeats nothing, whatever the documents are; yardsticks against counts by hand."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normfree.data.ngram import kneser_ney_perplexity
from normfree.data.packing import concatenated, windows

END = 7
LENGTHS = st.lists(st.integers(min_value=0, max_value=40), max_size=12)
CONTEXT = st.integers(min_value=2, max_value=9)


def numbered(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose every token is different (and not END), with its size in a second column."""
    starts = np.cumsum([100, *lengths])
    return [
        np.stack([np.arange(s, s + n), np.arange(s, s + n) % 5], axis=1) for s, n in zip(starts, lengths, strict=False)
    ]


def all_blocks(blocks) -> np.ndarray:
    return np.concatenate([np.empty((0,), dtype=int), *[block[:, :, 0].reshape(-1) for block in blocks]])


@given(lengths=LENGTHS, context=CONTEXT)
def test_windows_keep_all_but_tails_and_cross_no_document(lengths: list[int], context: int) -> None:
    documents = numbered(lengths)
    expected = [token for document in documents for token in document[: len(document) // context * context, 0].tolist()]
    blocks = list(windows(documents, context))
    assert all_blocks(blocks).tolist() == expected
    owner = {token: number for number, document in enumerate(documents) for token in document[:, 0].tolist()}
    for block_T in (row for block in blocks for row in block[:, :, 0]):
        assert len(block_T) == context
        assert len({owner[token] for token in block_T.tolist()}) == 1


@given(lengths=LENGTHS, context=CONTEXT)
def test_concatenation_keeps_all_tokens_with_ends_between(lengths: list[int], context: int) -> None:
    documents = numbered(lengths)
    stream = [token for document in documents for token in [*document[:, 0].tolist(), END]]
    blocks = list(concatenated(documents, context, end=END))
    assert all_blocks(blocks).tolist() == stream[: len(stream) // context * context]
    assert all((block[block[:, :, 0] == END][:, 1] == 0).all() for block in blocks)  # the end token has no bytes


def slow_perplexity(train: list[list[int]], held_out: list[list[int]], vocabulary: int, order: int) -> float:
    """Interpolated Kneser-Ney, one n-gram at a time."""
    grams = {
        n: Counter(tuple(row[i : i + n]) for row in train for i in range(len(row) - n + 1)) for n in range(1, order + 1)
    }
    counts = {order: grams[order]}
    for n in range(1, order):
        counts[n] = Counter(gram[1:] for gram in grams[n + 1])
        for gram in grams[n]:
            counts[n].setdefault(gram, 0)
    discounts, totals, continuations = {}, defaultdict(int), defaultdict(list)
    for n, table in counts.items():
        once, twice = sum(c == 1 for c in table.values()), sum(c == 2 for c in table.values())
        discounts[n] = once / (once + 2 * twice) if once and twice else 0.75
        for gram, count in table.items():
            totals[gram[:-1], n] += count
            continuations[gram[:-1], n].append(count)

    def probability(context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        lower = probability(context[1:], token) if context else 1 / vocabulary
        total = totals[context, n]
        if not total:
            return lower
        kept = max(counts[n][(*context, token)] - discounts[n], 0)
        spared = total - sum(max(count - discounts[n], 0) for count in continuations[context, n])
        return kept / total + spared / total * lower

    nats = [
        -math.log(probability(tuple(row[max(0, i - order + 1) : i]), row[i]))
        for row in held_out
        for i in range(1, len(row))
    ]
    return math.exp(sum(nats) / len(nats))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ngram_perplexity_equals_a_dictionary_of_counts(order: int) -> None:
    random = np.random.default_rng(order)
    train, held_out = random.zipf(1.6, (60, 12)).clip(max=9), random.zipf(1.6, (20, 12)).clip(max=10)
    expected = slow_perplexity(train.tolist(), held_out.tolist(), 11, order)
    assert kneser_ney_perplexity(train, held_out, vocab_size=11, order=order) == pytest.approx(expected, rel=1e-12)
