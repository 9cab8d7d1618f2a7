"""The order of training blocks: a pure function of data seed and position."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class BlockOrder(Sampler[int]):
    """Samples training blocks for a whole run, in a new permutation for each pass.

    Position p of the run is element p mod N of the permutation of pass p div N, so a resume at any step computes one
    permutation. The length is that of the whole run even after a resume: Trainer derives its schedule from it.
    """

    def __init__(self, *, blocks: int, sequences: int, seed: int, start: int = 0) -> None:
        self.blocks = blocks
        self.sequences = sequences
        self.seed = seed
        self.start = start

    def __len__(self) -> int:
        return self.sequences

    def __iter__(self) -> Iterator[int]:
        first_pass, last_pass = self.start // self.blocks, (self.sequences - 1) // self.blocks
        for number in range(first_pass, last_pass + 1):
            offset = number * self.blocks
            order = np.random.default_rng((self.seed, number)).permutation(self.blocks)
            yield from map(int, order[max(self.start - offset, 0) : self.sequences - offset])
