"""Prepare corpora without progress, and read their blocks."""

from pathlib import Path

import numpy as np

from normfree.data import Corpus, prepare
from normfree.spec.run import DataSpec


def make(spec: DataSpec, cache: Path) -> Corpus:
    return prepare(spec, cache=cache, progress=False)


def token_ids(corpus: Corpus, split: str) -> np.ndarray:
    return np.array(getattr(corpus, split)["input_ids"][:])
