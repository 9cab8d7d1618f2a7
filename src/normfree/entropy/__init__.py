"""Attention entropy of any Hugging Face model, without the T x T matrix."""

from normfree.entropy.functional import attention_entropy
from normfree.entropy.interventions import intervene
from normfree.entropy.probe import EntropyProbe
from normfree.entropy.request import AttentionEntropy
from normfree.entropy.statistics import HeadEntropy
from normfree.entropy.support import UnsupportedModel

__all__ = ["AttentionEntropy", "EntropyProbe", "HeadEntropy", "UnsupportedModel", "attention_entropy", "intervene"]
