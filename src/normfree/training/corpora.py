"""Corpora with targets of their own: labels of functions, or the masked spans of an encoder-decoder."""

# N blocks, T tokens, V vocabulary

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from normfree.data import Corpus
from normfree.data.corpus import SOURCES
from normfree.data.packing import unigram_perplexity
from normfree.files import fingerprint
from normfree.measures.held_out import in_evaluation_mode
from normfree.measures.text_perplexity import spread_places
from normfree.model import NormFreeConfig, classification
from normfree.model.modeling import NormFreePreTrainedModel
from normfree.model.spans import FIRST_SENTINEL, corrupt, masked_and_spans
from normfree.spec.families import CLASSIFICATIONS
from normfree.spec.run import RunSpec
from normfree.tasks.functions import functions_of
from normfree.tasks.labels import Labelled, labelled_texts, right_labels, usual_labels

MOST_BLOCKS = 16384
"""Blocks of a split whose targets are counted, spread evenly."""


@dataclass(frozen=True)
class LabelledCorpus(Corpus):
    """A corpus that trains on labelled functions of its held-out files, and tests on those of every third file."""

    spec: RunSpec

    @cached_property
    def texts(self) -> tuple[list[Labelled], list[Labelled]]:
        """To train and to test on. Raises ValueError if there are none."""
        data, task, tokenizer = self.spec.data, self.spec.train.objective, self.tokenizer()
        functions = functions_of(SOURCES[data.source](data).documents("validation", Counter()))
        parts = [f for f in functions if f.file % 3 < 2], [f for f in functions if f.file % 3 == 2]
        train, test = (labelled_texts(task, part, tokenizer, data.context) for part in parts)
        return train, test

    @cached_property
    def train(self) -> Dataset:
        """The labelled texts: columns `input_ids` and `labels`."""
        return Dataset.from_list([{"input_ids": text.input_ids, "labels": text.labels} for text in self.texts[0]])

    @torch.no_grad()
    def accuracy(self, model: classification.Classifier) -> dict[str, Any]:
        """What tasks.json.gz records: right labels of every item of the test, and those of the training's majority."""
        train, test = self.texts
        usual, of_token = usual_labels(train)
        predicted = {"model": [], "majority": [], "unigram": []}
        with in_evaluation_mode(model):
            for ids, labels, _ in test:
                ids_1T, labels_1T = torch.tensor([[ids], [labels]], device=model.device)
                predicted["model"].append(model(ids_1T, labels=labels_1T, classes=True).logits[0].argmax(-1).tolist())
                predicted["majority"].append([usual] * len(ids))
                predicted["unigram"].append([of_token.get(token, usual) for token in ids])
        values = {name: right_labels(test, labels) for name, labels in predicted.items()}
        facts = {"unit": "right", "items_sha256": fingerprint([list(text) for text in test]), "trained_on": len(train)}
        return {**facts, "values": values, "sizes": right_labels(test, [text.labels for text in test])}

    def saved(self, model: classification.Classifier) -> NormFreePreTrainedModel:
        """The model to save: without its head for tokens, so that an Auto class loads it."""
        model.config.pad_token_id = cast(Any, self.tokenizer().eos_token_id)
        kind = getattr(classification, f"NormFreeFor{CLASSIFICATIONS[self.spec.train.objective][0]}")
        saved = kind(model.config)
        saved.load_state_dict({name: v for name, v in model.state_dict().items() if not name.startswith("lm_head.")})
        return saved


@dataclass(frozen=True)
class TargetCorpus(Corpus):
    """A corpus whose yardstick is the unigram of targets."""

    config: NormFreeConfig

    def processor(self) -> PreTrainedTokenizerFast:
        """The tokenizer, with the sentinels `<span_0>`, `<span_1>`, ...; the last of them ends a target."""
        tokenizer = self.tokenizer()
        first = tokenizer.get_vocab().get(FIRST_SENTINEL, self.vocab_size)  # known to that of a run to start with
        names = [FIRST_SENTINEL.replace("0", str(number)) for number in range(self.config.vocab_size - first)]
        tokenizer.add_tokens(names, special_tokens=True)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.config.vocab_size - 1)
        return tokenizer

    def predicted_bytes(self) -> np.ndarray:
        """(N,) zeros: sentinels have no bytes."""
        return np.zeros(len(self.validation), dtype=np.int64)

    def _counts(self, blocks: Dataset) -> np.ndarray:
        """(V,) how often each token is in the targets."""
        chosen = blocks.select(spread_places(len(blocks), MOST_BLOCKS)).with_format("numpy")
        _, target_NT = corrupt(torch.from_numpy(np.stack(chosen["input_ids"][:])), self.config)
        return np.bincount(target_NT.flatten().numpy(), minlength=self.config.vocab_size)

    def facts(self) -> dict[str, Any]:
        """What run.json records of the corpus: of perplexities the unigram's of targets alone."""
        facts = super().facts()
        masked, spans = masked_and_spans(facts["context"], self.config)
        unigram = unigram_perplexity(self._counts(self.train), self._counts(self.validation))
        own = {"masked_tokens": masked, "spans": spans, "unigram_perplexity": unigram, "ngram_perplexity": {}}
        return {**facts, **own}
