"""A yardstick for language models: the perplexity of an n-gram model on the same tokens.

Interpolated Kneser-Ney smoothing with one discount per order (Kneser and Ney 1995; Chen and Goodman 1998, equation 24).
N-grams never cross the edge of a block, and a token is predicted from at most the tokens before it in its block, as a
transformer predicts it.

Shape legend: N blocks, T tokens, U distinct n-grams.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
ORDERS = {2: 100_000_000, 5: 20_000_000}
"""Orders of the yardstick, and the most training tokens for which each is counted (about 150 bytes a token)."""


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length."""

    keys_U: Ids  # each n-gram as one integer, sorted: number of its first n - 1 tokens * vocabulary + last token
    smoothed_U: NDArray[np.float64]  # (count - discount) / count of the context
    backoff: NDArray[np.float64]  # what each context, by its number, leaves to the next shorter order


def kneser_ney_perplexity(train_NT: Ids, held_out_NT: Ids, *, vocab_size: int, order: int = 5) -> float:
    """Perplexity on `held_out_NT` of an n-gram model of `train_NT`; the first token of a block is not predicted."""
    orders = _build_orders(train_NT.astype(np.int64), vocab_size, min(order, train_NT.shape[1]))
    nats = -np.log(_probabilities(held_out_NT.astype(np.int64), orders, vocab_size)[:, 1:])
    return float(np.exp(nats.mean()))


def _build_orders(ids_NT: Ids, vocab_size: int, order: int) -> list[_Order]:
    """Build orders 1 to `order`: the longest counts occurrences, the others the distinct tokens before an n-gram."""
    numbers_by_order, keys_by_order, counts_by_order = [], [], []
    numbers_NT = np.zeros((len(ids_NT), ids_NT.shape[1] + 1), dtype=np.int64)  # the empty n-gram
    for length in range(1, order + 1):
        ends_NT = ids_NT[:, length - 1 :]
        keys_NT = numbers_NT[:, : ends_NT.shape[1]] * vocab_size + ends_NT
        keys_U, first_U, numbers, counts_U = np.unique(
            keys_NT, return_index=True, return_inverse=True, return_counts=True
        )
        if length > 1:  # every distinct n-gram is one context of the n-gram that it ends with
            rows, columns = np.divmod(first_U, keys_NT.shape[1])
            endings_U = numbers_by_order[-1][rows, columns + 1]
            counts_by_order[-1] = np.bincount(endings_U, minlength=len(keys_by_order[-1]))
        numbers_NT = numbers.reshape(keys_NT.shape)
        numbers_by_order.append(numbers_NT)
        keys_by_order.append(keys_U)
        counts_by_order.append(counts_U)
    return [_smooth(keys, counts, vocab_size) for keys, counts in zip(keys_by_order, counts_by_order, strict=True)]


def _smooth(keys_U: Ids, counts_U: Ids, vocab_size: int) -> _Order:
    once, twice = np.count_nonzero(counts_U == 1), np.count_nonzero(counts_U == 2)
    discount = once / (once + 2 * twice) if once and twice else 0.75
    contexts_U = keys_U // vocab_size
    totals = np.bincount(contexts_U, weights=counts_U)
    discounted_U = np.maximum(counts_U - discount, 0)
    with np.errstate(invalid="ignore", divide="ignore"):  # a context at the end of every block has no continuation
        backoff = (totals - np.bincount(contexts_U, weights=discounted_U)) / totals
        smoothed_U = discounted_U / totals[contexts_U]
    return _Order(keys_U, np.nan_to_num(smoothed_U), np.where(totals > 0, backoff, 1.0))


def _probabilities(ids_NT: Ids, orders: list[_Order], vocab_size: int) -> NDArray[np.float64]:
    """(N, T) probability of each token, from the longest context that its block and the orders allow."""
    probabilities_NT = np.full(ids_NT.shape, 1 / vocab_size)
    numbers_NT = np.zeros((len(ids_NT), ids_NT.shape[1] + 1), dtype=np.int64)
    for length, table in enumerate(orders, start=1):
        ends_NT = ids_NT[:, length - 1 :]
        contexts_NT = numbers_NT[:, : ends_NT.shape[1]]
        keys_NT = contexts_NT * vocab_size + ends_NT
        places_NT = np.searchsorted(table.keys_U, keys_NT).clip(max=len(table.keys_U) - 1)
        seen_NT = (table.keys_U[places_NT] == keys_NT) & (contexts_NT >= 0)
        has_context_NT = (contexts_NT >= 0) & (contexts_NT < len(table.backoff))
        backoff_NT = np.where(has_context_NT, table.backoff[contexts_NT.clip(0, len(table.backoff) - 1)], 1.0)
        lower_NT = probabilities_NT[:, length - 1 :]
        probabilities_NT[:, length - 1 :] = np.where(seen_NT, table.smoothed_U[places_NT], 0.0) + backoff_NT * lower_NT
        numbers_NT = np.where(seen_NT, places_NT, -1)
    return probabilities_NT
