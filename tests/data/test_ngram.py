"""The n-gram yardstick against a dictionary of counts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from normfree.data.ngram import kneser_ney_perplexity


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
def test_it_equals_a_dictionary_of_counts(order: int) -> None:
    random = np.random.default_rng(order)
    train, held_out = random.zipf(1.6, (60, 12)).clip(max=9), random.zipf(1.6, (20, 12)).clip(max=10)
    expected = slow_perplexity(train.tolist(), held_out.tolist(), 11, order)
    assert kneser_ney_perplexity(train, held_out, vocab_size=11, order=order) == pytest.approx(expected, rel=1e-12)
