"""Decoders with a classification head: one class a text, or one a token."""

# B texts, T tokens, C classes

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from .configuration import NormFreeConfig
from .modeling import NormFreeCausalLMOutput, NormFreeForCausalLM, NormFreeModel, NormFreePreTrainedModel


class NormFreeForTokenClassification(NormFreePreTrainedModel):
    """Logits (B, T, C) of each token from the tokens up to it."""

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__(config)
        self.model = NormFreeModel(config)
        self.dropout = nn.Identity()
        self.score = nn.Linear(config.hidden_size, config.num_labels)  # pyright: ignore[reportArgumentType]
        self.post_init()

    forward = GenericForTokenClassification.forward


class NormFreeForSequenceClassification(NormFreeForTokenClassification):
    """Logits (B, C) at the last token of each text that is not `config.pad_token_id`."""

    forward = GenericForSequenceClassification.forward


class Classifier(NormFreeForCausalLM):
    """A language model that trains a head for classes on its body; without `classes` it stays the language model."""

    _auto_class = None  # its checkpoints need no code

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)  # pyright: ignore[reportArgumentType]
        self.post_init()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor | None = None, *, classes: bool = False, logits_to_keep: int | Tensor = 0, **kwargs: Any
    ) -> Any:
        """With `classes`: logits (B, T, C) and their loss in nats on `labels` (B, T), -100 where there is none."""
        if not classes:
            return super().forward(input_ids, logits_to_keep=logits_to_keep, **kwargs)
        labels_BT, items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        outputs = self.model(input_ids, **kwargs)
        logits_BTC = self.score(outputs.last_hidden_state)
        sum_nats = F.cross_entropy(logits_BTC.float().mT, labels_BT, reduction="sum")
        loss = sum_nats / ((labels_BT >= 0).sum() if items is None else items)
        return NormFreeCausalLMOutput(loss=loss, logits=logits_BTC)
