"""Span corruption (T5, arXiv 1910.10683): masked spans of a block become one sentinel each, and make its target.

Of a block `a b c d e f` with the spans `b c` and `f` the source is `a X d e Y` and the target `X b c Y f Z`. Sentinels
are the last tokens of the vocabulary. All blocks of one length have as many masked tokens and spans.
"""

# B blocks, T tokens of a block, M masked tokens, N spans

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .configuration import NormFreeConfig

FIRST_SENTINEL = "<span_0>"
"""Its name in the tokenizer that is saved with a model."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def masked_and_spans(tokens: int, config: NormFreeConfig) -> tuple[int, int]:
    """How many tokens of a block are masked, and in how many spans. Raises ValueError for a block that is too short."""
    masked = max(1, round(tokens * config.noise_share))
    spans = max(1, round(masked / config.span_tokens))
    if spans > tokens - masked:
        raise ValueError(
            f"{tokens} tokens with noise_share={config.noise_share} and span_tokens={config.span_tokens} leave less "
            "than one token before each span: give a longer data.context, or less noise"
        )
    return masked, spans


def sentinels(tokens: int, config: NormFreeConfig) -> int:
    """Tokens that blocks of so many tokens need behind the vocabulary: one for each span and one for the end."""
    return 1 + masked_and_spans(tokens, config)[1] if config.family == "encoder_decoder" else 0


def corrupt(blocks_BT: Tensor, config: NormFreeConfig) -> tuple[Tensor, Tensor]:
    """Sources (B, T - M + N) and targets (B, M + N + 1): by a block's tokens and `config.span_seed`, always the same.

    Lengths of spans, and of the text before each, are uniform among those with the same sum. Raises ValueError as
    `masked_and_spans` does.
    """
    tokens_BT = blocks_BT.cpu().numpy().astype(np.int64)
    batch, tokens = tokens_BT.shape
    masked, spans = masked_and_spans(tokens, config)
    keys_BT = _keys(tokens_BT, config.span_seed)
    lengths_BN2 = np.stack(
        [
            _partition(keys_BT[:, masked - 1 : tokens - 2], tokens - masked, spans),
            _partition(keys_BT[:, : masked - 1], masked, spans),
        ],
        axis=2,
    )
    ends_BK = lengths_BN2.reshape(batch, -1).cumsum(1)  # of text, span, text, span, ...
    piece_BT = (np.arange(tokens) >= ends_BK[:, :, None]).sum(1)
    is_masked_BT = piece_BT % 2 == 1
    is_first_BT = is_masked_BT & (np.diff(piece_BT, prepend=0, axis=1) > 0)
    sentinels_BT = config.vocab_size - 1 - spans + piece_BT // 2
    source_BS = np.where(is_first_BT, sentinels_BT, tokens_BT)[~is_masked_BT | is_first_BT].reshape(batch, -1)
    pairs_BT2, kept_BT2 = np.stack([sentinels_BT, tokens_BT], 2), np.stack([is_first_BT, is_masked_BT], 2)
    target_BR = pairs_BT2[kept_BT2].reshape(batch, -1)
    target_BR = np.pad(target_BR, ((0, 0), (0, 1)), constant_values=config.vocab_size - 1)
    return torch.from_numpy(source_BS), torch.from_numpy(target_BR)


def _keys(tokens_BT: np.ndarray, seed: int) -> np.ndarray:
    """(B, T) random uint64 from all tokens of a block: splitmix64 of a hash of them."""
    places_T = np.arange(1, tokens_BT.shape[1] + 1, dtype=np.uint64)
    hash_B = _mix(tokens_BT.astype(np.uint64) + places_T * _GOLDEN).sum(1, dtype=np.uint64) + np.uint64(seed)
    return _mix(_mix(hash_B)[:, None] + places_T * _GOLDEN)


def _mix(numbers: np.ndarray) -> np.ndarray:
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _partition(keys_BI: np.ndarray, total: int, parts: int) -> np.ndarray:
    """(B, parts) lengths of at least 1 that sum to `total`; the order of I = total - 1 keys chooses the cuts."""
    cuts_BN = np.sort(np.argsort(keys_BI, axis=1, kind="stable")[:, : parts - 1] + 1, axis=1)
    return np.diff(cuts_BN, prepend=0, append=total, axis=1)
