"""Attention entropy of any Hugging Face causal language model, without the T x T matrix.

This room imports nothing of ours and knows no model of ours.
"""

from normfree.entropy.functional import AttentionEntropy, attention_entropy
from normfree.entropy.probe import EntropyProbe
from normfree.entropy.statistics import HeadEntropy
from normfree.entropy.support import UnsupportedModel

__all__ = ["AttentionEntropy", "EntropyProbe", "HeadEntropy", "UnsupportedModel", "attention_entropy"]
