"""Denoising: a corpus of blocks whose masked spans are the targets of an encoder-decoder."""

# N blocks, T tokens, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from normfree.data import Corpus
from normfree.data.packing import unigram_perplexity
from normfree.measures.text_perplexity import spread_places
from normfree.model import NormFreeConfig
from normfree.model.spans import FIRST_SENTINEL, corrupt, masked_and_spans

MOST_BLOCKS = 16384
"""Blocks of a split whose targets are counted, spread evenly."""


@dataclass(frozen=True)
class TargetCorpus(Corpus):
    """A corpus whose yardstick is the unigram of targets."""

    config: NormFreeConfig

    def processor(self) -> PreTrainedTokenizerFast:
        """The tokenizer, with the sentinels `<span_0>`, `<span_1>`, ...; the last of them ends a target."""
        tokenizer, behind = self.tokenizer(), range(self.config.vocab_size - self.vocab_size)
        tokenizer.add_tokens([FIRST_SENTINEL.replace("0", str(number)) for number in behind], special_tokens=True)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.config.vocab_size - 1)
        return tokenizer

    def predicted_bytes(self) -> np.ndarray:
        """(N,) zeros: sentinels have no bytes."""
        return np.zeros(len(self.validation), dtype=np.int64)

    @cached_property
    def _unigram_perplexity(self) -> float:
        return unigram_perplexity(self._counts(self.train), self._counts(self.validation))

    def _counts(self, blocks: Dataset) -> np.ndarray:
        """(V,) how often each token is in the targets."""
        chosen = blocks.select(spread_places(len(blocks), MOST_BLOCKS)).with_format("numpy")
        _, target_NT = corrupt(torch.from_numpy(np.stack(chosen["input_ids"][:])), self.config)
        return np.bincount(target_NT.flatten().numpy(), minlength=self.config.vocab_size)

    def facts(self) -> dict[str, Any]:
        """What run.json records of the corpus: of perplexities the unigram's of targets alone."""
        facts = super().facts()
        masked, spans = masked_and_spans(facts["context"], self.config)
        own = {"masked_tokens": masked, "spans": spans, "unigram_perplexity": self._unigram_perplexity}
        return {**facts, **own, "ngram_perplexity": {}}
