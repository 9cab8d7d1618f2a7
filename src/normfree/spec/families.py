"""FAMILIES: what each family of models reads, the headline of its runs, and the highest entropy of its heads.

The same names choose the model in `normfree.model.HEADS`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Score:
    """The headline of a run: a number of its evaluation after training."""

    name: str
    """Its key in the evaluation, and its quantity."""
    axis: str
    """Its name on the axis of a figure."""
    better: str
    """`higher` or `lower`."""
    scale: float = 1.0
    """What it is multiplied by where it is shown: 100 shows a share in percent."""
    unit: str
    """Of a difference: `%`, as a share of the score, or percentage `points`."""
    beside: tuple[str, str] = ("loss_nats", "Loss (nats)")
    """Another number of the evaluation for its table, and that number's title."""

    @property
    def higher_is_better(self) -> bool:
        return self.better == "higher"

    @property
    def relative(self) -> bool:
        """True if differences are shares of the score."""
        return self.unit == "%"


@dataclass(frozen=True, kw_only=True)
class Family:
    """What tells the runs of a family from those of others. No torch needed."""

    sources: tuple[str, ...]
    """Names of `data` that it reads."""
    score: Score
    measures: tuple[str, ...]
    """Measured on the held-out data while training; the score is among their quantities."""
    objectives: tuple[str, ...]
    """Values of `train.objective` that work with it."""
    causal: bool
    """True if a token sees those before it only."""
    ceiling: Callable[[int], float]
    """Entropy in nats of a head that attends evenly to all that it sees, by the number of tokens."""
    corpus: str
    """The corpus in words, of its facts."""


_ACCURACY = Score(name="accuracy", axis="accuracy on held-out images (%)", better="higher", scale=100.0, unit="points")
CLASSIFICATIONS = {
    "syntax_error": ("SequenceClassification", "text-classification"),
    "token_type": ("TokenClassification", "token-classification"),
}
"""Objectives that train a classification head; the end of its Auto class, and the hub's name of that."""

_PERPLEXITY = Score(
    name="perplexity", axis="validation perplexity", better="lower", unit="%", beside=("bits_per_byte", "Bits per byte")
)
_ENTROPY = ("entropy_target", "entropy_band")
_OF_TEXT = ("installed", "codeparrot", "hub", "files")
FAMILIES = {
    "decoder": Family(
        sources=_OF_TEXT,
        score=_PERPLEXITY,
        measures=("perplexity",),
        objectives=("next_token", *_ENTROPY, *CLASSIFICATIONS),
        causal=True,
        ceiling=lambda tokens: math.lgamma(tokens + 1) / tokens,
        corpus="source {source}, blocks of {context} tokens, vocabulary {vocab_size:,}, {train_tokens:,} tokens to "
        "train on, {validation_tokens:,} held-out tokens, unigram perplexity {unigram_perplexity:.1f}, fingerprint "
        "{fingerprint:.12}",
    ),
    "vision": Family(
        sources=("fashion_mnist", "images", "hub_images"),
        score=_ACCURACY,
        measures=("perplexity", "accuracy"),
        objectives=("next_token", *_ENTROPY),
        causal=False,
        ceiling=math.log,
        corpus="source {source}, images of {image_size} x {image_size} pixels with {num_channels} channel(s), "
        "{vocab_size:,} classes, {train_blocks:,} images to train on, {validation_blocks:,} held-out images, "
        "fingerprint {fingerprint:.12}",
    ),
    "encoder_decoder": Family(
        sources=_OF_TEXT,
        score=replace(_PERPLEXITY, axis="validation perplexity of targets", beside=("loss_nats", "Loss (nats)")),
        measures=("perplexity",),
        objectives=("next_token",),
        causal=False,
        ceiling=math.log,
        corpus="source {source}, blocks of {context} tokens, of which {masked_tokens} in {spans} spans are masked and "
        "make the target, vocabulary {vocab_size:,}, {train_blocks:,} blocks to train on, {validation_blocks:,} "
        "held-out blocks, unigram perplexity of targets {unigram_perplexity:.1f}, fingerprint {fingerprint:.12}",
    ),
}

_DOCSTRINGS = (
    "source {source}, functions in rows of {context} tokens, of which the last {target_tokens} hold the target, the "
    "first line of the docstring, vocabulary {vocab_size:,}, {train_blocks:,} functions to train on, "
    "{validation_blocks:,} held out with {validation_target_tokens:,} tokens of targets, unigram perplexity of targets "
    "{unigram_perplexity:.1f}, fingerprint {fingerprint:.12}"
)
"""Corpus of an encoder-decoder with data.packing=docstring."""


def family_of(spec: Mapping[str, Any]) -> Family:
    """The family of a run by its spec, as run.json has it; older records are decoders."""
    family = FAMILIES[spec["model"].get("family", "decoder")]
    return replace(family, corpus=_DOCSTRINGS) if spec.get("data", {}).get("packing") == "docstring" else family


def score_of(spec: Mapping[str, Any]) -> Score:
    """The headline of a run by its spec: that of its family, or the accuracy of a run that classifies text."""
    if spec["train"].get("objective") in CLASSIFICATIONS:
        return replace(_ACCURACY, axis="accuracy on held-out texts (%)", beside=("bits_per_byte", "Bits per byte"))
    return family_of(spec).score


def image_tokens(model: Mapping[str, Any]) -> int:
    """Tokens of an image by the fields of a vision model: its patches, and the class token."""
    patches = (model.get("image_size", 28) // model.get("patch_size", 4)) ** 2
    return patches + (model.get("pooling", "class_token") == "class_token")
