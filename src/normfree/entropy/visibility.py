"""Which keys each query row may see, asked for one block of rows at a time.

Nothing here ever holds a T x S matrix that the caller did not bring.
"""

# B batch, H query heads, T query, S key, R rows of one block, C columns of one block

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROWS = 256
"""Rows looked at together where a mask has to be spelled out."""


@dataclass(frozen=True)
class Block:
    """Query rows [start, stop) against the key columns [first, last) that at least one of them may see.

    `visible` is bool, `bias` is what an additive mask adds to the scores (None where it adds nothing);
    both broadcast to (B, H, R, C).
    """

    start: int
    stop: int
    first: int
    last: int
    visible: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Visibility:
    """The intersection of causality, a sliding window and a mask.

    Query t stands at key position S - T + t, so that the last query may see every key (KV cache).
    `mask` broadcasts to (B, H, T, S): bool with True for visible, or float and additive, where a value at
    or below half of the dtype's minimum (or -inf) hides the key.
    """

    queries: int
    keys: int
    causal: bool
    window: int | None
    mask: Tensor | None
    device: torch.device

    @property
    def is_plain_causal(self) -> bool:
        """True where a kernel's own causal flag says the same as this object."""
        return self.causal and self.mask is None and self.window is None and self.queries == self.keys

    @property
    def is_full(self) -> bool:
        """True where every row sees every key; a single causal query does."""
        return self.mask is None and self.window is None and (not self.causal or self.queries == 1)

    def adds_bias(self) -> bool:
        """Whether the mask adds anything but 0 to a score that stays visible."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return False
        return any(bool((part[~hidden(part)] != 0).any()) for part in self.mask.split(ROWS, dim=-2))

    def blocks(self, rows: int) -> Iterator[Block]:
        """Blocks of at most `rows` query rows, narrowed to the columns that they need."""
        for start in range(0, self.queries, rows):
            yield self._block(start, min(start + rows, self.queries))

    def counts(self) -> Tensor:
        """Visible keys of every row, int64, shape (B or 1, H or 1, T)."""
        if self.is_full:
            return torch.full((1, 1, self.queries), self.keys, device=self.device)
        if self.is_plain_causal:
            return torch.arange(1, self.keys + 1, device=self.device).view(1, 1, -1)
        return torch.cat([block.visible.sum(-1) for block in self.blocks(ROWS)], dim=-1)

    def first_key(self) -> Tensor:
        """The first key that the mask lets any row see (the first real token under left padding), (B or 1, H or 1).

        A window plays no part: the first token stays the first where no row of this call reaches it any more.
        """
        first = torch.full((1, 1), self.keys, device=self.device)
        # Causality shows the last row everything, so one row tells where a mask has no more.
        queries = 1 if self.mask is None or self.mask.shape[-2] == 1 else self.queries
        for block in replace(self, window=None, queries=queries).blocks(ROWS):
            if block.first < block.last:
                seen = block.visible.any(-2)
                index = seen.to(torch.int8).argmax(-1) + block.first
                first = torch.minimum(first, torch.where(seen.any(-1), index, self.keys))
        return first

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """What is visible and the bias, as a `Block` has them, of all rows and keys: (B or 1, H or 1, T, S).

        Only for callers that need them spelled out.
        """
        query_T1 = torch.arange(self.keys - self.queries, self.keys, device=self.device)[:, None]
        key_S = torch.arange(self.keys, device=self.device)
        part, bias = self._mask_part(0, self.queries, 0, self.keys)
        visible = self._by_position(query_T1, key_S)
        return visible if part is None else visible & part, bias

    def _block(self, start: int, stop: int) -> Block:
        offset = self.keys - self.queries
        first = max(0, start + offset - self.window + 1) if self.window is not None else 0
        last = min(self.keys, max(stop + offset, 0)) if self.causal else self.keys
        first = min(first, last)
        part, bias = self._mask_part(start, stop, first, last)
        if part is not None and first < last:
            columns = part.flatten(0, -2).any(0).nonzero().flatten()
            # Narrowing to what the mask shows halves the work under a causal mask, more under a window.
            low, high = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
            part, bias = part[..., low:high], None if bias is None else bias[..., low:high]
            first, last = first + low, first + high
        query_R1 = torch.arange(start + offset, stop + offset, device=self.device)[:, None]
        key_C = torch.arange(first, last, device=self.device)
        visible = self._by_position(query_R1, key_C)
        return Block(start, stop, first, last, visible if part is None else visible & part, bias)

    def _by_position(self, query_R1: Tensor, key_C: Tensor) -> Tensor:
        visible_RC = torch.ones(len(query_R1), len(key_C), dtype=torch.bool, device=self.device)
        if self.causal:
            visible_RC = visible_RC & (key_C <= query_R1)
        if self.window is not None:
            visible_RC = visible_RC & (key_C > query_R1 - self.window)
        return visible_RC[None, None]

    def _mask_part(self, start: int, stop: int, first: int, last: int) -> tuple[Tensor | None, Tensor | None]:
        if self.mask is None:
            return None, None
        rows = self.mask if self.mask.shape[-2] == 1 else self.mask[..., start:stop, :]
        part = rows if self.mask.shape[-1] == 1 else rows[..., first:last]
        part = part.expand(*part.shape[:-1], last - first)
        if part.dtype == torch.bool:
            return part, None
        is_hidden = hidden(part)
        return ~is_hidden, part.masked_fill(is_hidden, 0.0)


def last_key_is_hidden(mask: Tensor | None) -> bool:
    """Whether no row sees the last key: the room behind the newest token in a static cache."""
    if mask is None:
        return False
    last = mask[..., -1]
    return not bool((last if last.dtype == torch.bool else ~hidden(last)).any())


def padding_rows(mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """(B or 1, H or 1, T): True for the queries of padding, known by a key of their own that no row sees.

    None where the mask does not say: without one, where keys of a cache shift the positions, and where rows pick single
    keys (a top-k index), so that nobody may have picked a real one.
    """
    if mask is None or queries != keys or mask.shape[-1] != keys:
        return None
    if mask.dim() == 2:
        return (mask == 0)[:, None]
    visible = mask if mask.dtype == torch.bool else ~hidden(mask)
    seen = visible.any(-2)
    return None if _picks_single_keys(visible, seen) else ~seen


def _picks_single_keys(visible_BHTS: Tensor, seen_BHS: Tensor) -> bool:
    """Whether a row leaves out a key between two that it sees: causality, windows, chunks and padding never do."""
    place_BHS = seen_BHS.cumsum(-1, dtype=torch.int32)  # among the keys that any row sees
    for rows_BHRS in visible_BHTS.split(ROWS, dim=-2):
        place_BHRS = torch.where(rows_BHRS, place_BHS[..., None, :], 0)
        last_BHR = place_BHRS.amax(-1)
        first_BHR = place_BHRS.masked_fill_(~rows_BHRS, place_BHS.shape[-1] + 1).amin(-1)
        count_BHR = rows_BHRS.sum(-1)
        if bool(((count_BHR > 0) & (last_BHR - first_BHR + 1 != count_BHR)).any()):
            return True
    return False


def hidden(additive: Tensor) -> Tensor:
    """Where an additive mask hides its key: half of the minimum, because models add a bias to a mask that already holds
    the minimum."""
    return additive <= torch.finfo(additive.dtype).min / 2
