"""The n-gram yardstick against a dictionary of counts, and against distributions that are known."""

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


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    random = np.random.default_rng(0)
    train = random.integers(0, 7, (30, 9))
    history = np.tile(random.integers(0, 7, (1, 4)), (7, 1))
    rows = np.concatenate([history, np.arange(7)[:, None]], axis=1)
    shorter = [kneser_ney_perplexity(train, history, vocab_size=7)] * 7
    whole = [kneser_ney_perplexity(train, row[None], vocab_size=7) for row in rows]
    last = [1 / (perplexity**4 / before**3) for perplexity, before in zip(whole, shorter, strict=True)]
    assert sum(last) == pytest.approx(1, rel=1e-9)


def test_a_repeating_text_becomes_predictable_and_noise_does_not() -> None:
    cycle = np.tile(np.arange(8), (200, 2))
    assert kneser_ney_perplexity(cycle, cycle[:5], vocab_size=8, order=2) < 1.01
    noise = np.random.default_rng(0).integers(0, 8, (400, 64))
    assert kneser_ney_perplexity(noise[:390], noise[390:], vocab_size=8, order=2) == pytest.approx(8, rel=0.01)
