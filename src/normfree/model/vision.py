"""The vision transformer: patches of an image through the decoder's blocks, with attention to all of them."""

# B batch, C channels, P pixels on each side of an image, T tokens, E hidden size, K classes

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration import NormFreeVisionConfig
from .modeling import NormFreeModel, NormFreeModelOutput, NormFreePreTrainedModel, TrainingTerms

PIXEL_MEAN = PIXEL_STD = 0.5
"""Bytes become (byte / 255 - mean) / std, from -1 to 1: the defaults of transformers' ViTImageProcessor."""


@dataclass
class NormFreeImageClassifierOutput(TrainingTerms, ImageClassifierOutput):
    """A classifier's output."""


class NormFreeVisionModel(NormFreeModel):
    """Patches, blocks and the final norm."""

    config_class = NormFreeVisionConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    is_causal = False

    @capture_outputs
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, pixel_values: Tensor, entropy_layers: Collection[int] = (), **kwargs: Any
    ) -> NormFreeModelOutput:
        """Final hidden states (B, T, E) of images (B, C, P, P)."""
        if entropy_layers:
            self._check_entropy_layers(entropy_layers, whole_blocks=True)
        return self._outputs(self.embed_tokens(pixel_values), entropy_layers=entropy_layers, **kwargs)


class NormFreeForImageClassification(NormFreePreTrainedModel):
    """A classifier of images: the class token or the mean over patches to logits."""

    config_class = NormFreeVisionConfig
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: NormFreeVisionConfig) -> None:
        super().__init__(config)
        self.model = NormFreeVisionModel(config)
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    def batch_of(self, rows_BT: Tensor) -> dict[str, Tensor]:
        """Images and labels of rows of bytes: the pixels (C, P, P), then the class in two bytes, the high one first."""
        shape = (self.config.num_channels, self.config.image_size, self.config.image_size)
        pixels_BCPP = rows_BT[:, :-2].unflatten(1, shape).float() / 255
        labels_B = rows_BT[:, -2].long() * 256 + rows_BT[:, -1].long()
        return {"pixel_values": (pixels_BCPP - PIXEL_MEAN) / PIXEL_STD, "labels": labels_B}

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> NormFreeImageClassifierOutput:
        """Logits (B, K) of images (B, C, P, P), and with `labels` (B,) their mean cross-entropy in nats.

        The divisor of the loss is `num_items_in_batch`, unless given the number of labels.
        """
        outputs = self.model(pixel_values, **kwargs)
        tokens_BTE = outputs.last_hidden_state
        pooled_BE = tokens_BTE[:, 0] if self.config.pooling == "class_token" else tokens_BTE.mean(1)
        logits_BK, loss = self.classifier(pooled_BE), None
        if labels is not None:
            items = len(labels) if num_items_in_batch is None else num_items_in_batch
            loss = F.cross_entropy(logits_BK.float(), labels, reduction="sum") / items
        passed_on = ("hidden_states", "attentions", "head_entropies", "norm_sums", "sigma_variance")
        passed = {name: getattr(outputs, name) for name in passed_on}
        return NormFreeImageClassifierOutput(loss=loss, logits=logits_BK, **passed)
