"""Fine-tuning on labelled texts: the corpus that has them, and the accuracy of a model on its test."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from datasets import Dataset

from normfree.data import Corpus
from normfree.data.corpus import SOURCES
from normfree.files import fingerprint
from normfree.measures.held_out import in_evaluation_mode
from normfree.model import classification
from normfree.model.modeling import NormFreePreTrainedModel
from normfree.spec.families import CLASSIFICATIONS
from normfree.spec.run import RunSpec
from normfree.tasks.functions import functions_of
from normfree.tasks.labels import Labelled, labelled_texts, right_labels, usual_labels


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
