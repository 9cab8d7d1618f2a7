"""Which keys each query row may see, one block of rows at a time: no T x S matrix but the caller's own mask."""

# B batch, H query heads, T query, S key, R rows of one block, C columns of one block

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROWS = 256  # of one block where a mask is written out


@dataclass(frozen=True)
class Block:
    """Query rows [start, stop) and the key columns [first, last), one at least, that some of them may see.

    `visible` is bool, `bias` is what an additive mask adds to the scores; both broadcast to (B, H, R, C).
    """

    start: int
    stop: int
    first: int
    last: int
    visible: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Visibility:
    """The intersection of causality, a sliding window and a mask in 4D, as in `attention_entropy`."""

    queries: int
    keys: int
    causal: bool
    window: int | None
    mask: Tensor | None
    device: torch.device

    @property
    def causal_flag(self) -> bool | None:
        """A kernel's flag that expresses this visibility; None if it takes a mask."""
        if self.mask is not None or self.window is not None or (self.causal and 1 < self.queries != self.keys):
            return None
        return self.causal and self.queries == self.keys

    def adds_bias(self) -> bool:
        """True if the mask adds anything but 0 to a visible score."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return False
        return any(bool((part[shown(part)] != 0).any()) for part in self.mask.split(ROWS, dim=-2))

    def blocks(self, rows: int) -> Iterator[Block]:
        """Yield blocks of at most `rows` query rows, narrowed to the columns that they see."""
        offset = self.keys - self.queries
        for start in range(0, self.queries, rows):
            stop = min(start + rows, self.queries)
            last = min(self.keys, max(stop + offset, 1)) if self.causal else self.keys
            first = 0 if self.window is None else min(last - 1, max(0, start + offset - self.window + 1))
            if self.mask is not None:
                # This halves the work under a causal mask, and saves more under a window.
                shown_C = shown(self._mask_part(self.mask, start, stop, first, last)).flatten(0, -2).any(0)
                columns = (shown_C.nonzero().flatten() + first).tolist()
                first, last = (columns[0], columns[-1] + 1) if columns else (first, first + 1)
            yield self._block(start, stop, first, last)

    def counts(self) -> Tensor:
        """The number of visible keys of every row, int32, shape (B or 1, H or 1, T)."""
        if self.causal_flag:
            return torch.arange(1, self.keys + 1, dtype=torch.int32, device=self.device).view(1, 1, -1)
        return torch.cat([block.visible.sum(-1, dtype=torch.int32) for block in self.blocks(ROWS)], dim=-1)

    def first_key(self) -> Tensor:
        """The first key that any row of any head may see, (B or 1, 1): the first real token under left padding.

        Windows are ignored: the first token stays the first where no row of this call reaches it any more.
        """
        first = torch.full((1, 1), self.keys, device=self.device)
        # Causality shows the last row every key, so one row is enough unless the mask has more.
        queries = 1 if self.mask is None or self.mask.shape[-2] == 1 else self.queries
        for block in replace(self, window=None, queries=queries).blocks(ROWS):
            seen = block.visible.any(-2)
            index = seen.to(torch.int8).argmax(-1) + block.first
            first = torch.minimum(first, torch.where(seen.any(-1), index, self.keys))
        return first.amin(-1, keepdim=True)

    def whole(self) -> Block:
        """All rows and keys, for callers that need the matrix."""
        return self._block(0, self.queries, 0, self.keys)

    def _block(self, start: int, stop: int, first: int, last: int) -> Block:
        offset = self.keys - self.queries
        query_R1 = torch.arange(start + offset, stop + offset, device=self.device)[:, None]
        key_C = torch.arange(first, last, device=self.device)
        visible = torch.ones(1, 1, stop - start, last - first, dtype=torch.bool, device=self.device)
        if self.causal:
            visible = visible & (key_C <= query_R1)
        if self.window is not None:
            visible = visible & (key_C > query_R1 - self.window)
        bias = None
        if self.mask is not None:
            part = self._mask_part(self.mask, start, stop, first, last)
            visible = visible & shown(part)
            bias = None if part.dtype == torch.bool else part.masked_fill(~shown(part), 0.0)
        return Block(start, stop, first, last, visible, bias)

    @staticmethod
    def _mask_part(mask: Tensor, start: int, stop: int, first: int, last: int) -> Tensor:
        rows = mask if mask.shape[-2] == 1 else mask[..., start:stop, :]
        part = rows if mask.shape[-1] == 1 else rows[..., first:last]
        return part.expand(*part.shape[:-1], last - first)


def padding_rows(mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """(B or 1, H or 1, T): True for padded queries, recognised by a key of their own that no row sees.

    None where the mask does not tell: there is none, a cache shifts the positions, or rows pick single keys (top-k).
    """
    if mask is None or queries != keys or mask.shape[-1] != keys:
        return None
    if mask.dim() == 2:
        return (mask == 0)[:, None]
    seen = shown(mask).any(-2)
    return None if _picks_single_keys(shown(mask), seen) else ~seen


def _picks_single_keys(visible_BHTS: Tensor, seen_BHS: Tensor) -> bool:
    """True if a row skips a key between two that it sees, which causality, windows, chunks and padding never do."""
    place_BHS = seen_BHS.cumsum(-1, dtype=torch.int32)  # among the keys that any row sees
    for rows_BHRS in visible_BHTS.split(ROWS, dim=-2):
        place_BHRS = torch.where(rows_BHRS, place_BHS[..., None, :], 0)
        last_BHR = place_BHRS.amax(-1)
        first_BHR = place_BHRS.masked_fill_(~rows_BHRS, place_BHS.shape[-1] + 1).amin(-1)
        count_BHR = rows_BHRS.sum(-1)
        if bool(((count_BHR > 0) & (last_BHR - first_BHR + 1 != count_BHR)).any()):
            return True
    return False


def shown(mask: Tensor) -> Tensor:
    """Where a mask shows its key: True, or above half of the minimum, as models add a bias to the minimum."""
    return mask if mask.dtype == torch.bool else ~(mask <= torch.finfo(mask.dtype).min / 2)
