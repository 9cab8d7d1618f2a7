"""Span corruption (T5, arXiv 1910.10683): masked spans of a block become one sentinel each, and make its target.

Of a block `a b c d e f` with the spans `b c` and `f` the source is `a X d e Y` and the target `X b c Y f Z`. Sentinels
are the last tokens of the vocabulary. All blocks of one length have as many masked tokens and spans.
"""

# B blocks, T tokens of a block, M masked tokens, N spans

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration import NormFreeConfig

FIRST_SENTINEL = "<span_0>"
"""Its name in the tokenizer that is saved with a model."""
_GOLDEN, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Of splitmix64, as the int64 that wrap around like its uint64."""


def masked_and_spans(tokens: int, config: NormFreeConfig) -> tuple[int, int]:
    """How many tokens of a block are masked, and in how many spans. Raises ValueError for a block that is too short."""
    masked = max(1, round(tokens * config.noise_share))
    spans = max(1, round(masked / config.span_tokens))
    if spans > tokens - masked:
        noise = f"noise_share={config.noise_share} and span_tokens={config.span_tokens}"
        raise ValueError(f"{tokens} tokens are too few for {noise}: give a longer data.context, or less noise")
    return masked, spans


def corrupt(blocks_BT: Tensor, config: NormFreeConfig) -> tuple[Tensor, Tensor]:
    """Sources (B, T - M + N) and targets (B, M + N + 1): by a block's tokens and `config.span_seed`, always the same.

    Lengths of spans, and of the text before each, are uniform among those with the same sum. Raises ValueError as
    `masked_and_spans` does.
    """
    batch, tokens = blocks_BT.shape
    masked, spans = masked_and_spans(tokens, config)
    keys_BT = _keys(blocks_BT.long(), config.span_seed)
    texts_BN = _partition(keys_BT[:, masked - 1 : tokens - 2], tokens - masked, spans)
    spans_BN = _partition(keys_BT[:, : masked - 1], masked, spans)
    ends_BK = torch.stack([texts_BN, spans_BN], 2).flatten(1).cumsum(1)  # of text, span, text, span, ...
    places_BT = torch.arange(tokens, device=blocks_BT.device).expand(batch, -1).contiguous()
    piece_BT = torch.searchsorted(ends_BK, places_BT, right=True)
    is_masked_BT = piece_BT % 2 == 1
    is_first_BT = is_masked_BT & (piece_BT.diff(dim=1, prepend=piece_BT[:, :1]) > 0)
    sentinels_BT = config.vocab_size - 1 - spans + piece_BT // 2
    source_BS = torch.where(is_first_BT, sentinels_BT, blocks_BT)[~is_masked_BT | is_first_BT].view(batch, -1)
    pairs_BT2, kept_BT2 = torch.stack([sentinels_BT, blocks_BT.long()], 2), torch.stack([is_first_BT, is_masked_BT], 2)
    return source_BS, F.pad(pairs_BT2[kept_BT2].view(batch, -1), (0, 1), value=config.vocab_size - 1)


def _keys(tokens_BT: Tensor, seed: int) -> Tensor:
    """(B, T) random numbers from all tokens of a block: splitmix64 of a hash of them."""
    steps_T = torch.arange(1, tokens_BT.shape[1] + 1, device=tokens_BT.device) * _GOLDEN
    return _mix(_mix(_mix(tokens_BT + steps_T).sum(1) + seed)[:, None] + steps_T)


def _mix(numbers: Tensor) -> Tensor:
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        numbers = (numbers ^ (numbers >> shift & 2 ** (64 - shift) - 1)) * factor
    return numbers


def _partition(keys_BI: Tensor, total: int, parts: int) -> Tensor:
    """(B, parts) lengths of at least 1 that sum to `total`; the order of I = total - 1 keys chooses the cuts."""
    cuts_BN = keys_BI.argsort(dim=1, stable=True)[:, : parts - 1].sort(dim=1).values + 1
    return F.pad(F.pad(cuts_BN, (1, 0)), (0, 1), value=total).diff(dim=1)
