"""The vision transformer: patches of an image through the decoder's blocks, with attention to all of them."""

# B batch, C channels, P pixels on each side of an image, T tokens, E hidden size, K classes

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration import NormFreeConfig, NormFreeVisionConfig
from .modeling import NormFreeModel, NormFreeModelOutput, NormFreePreTrainedModel, TrainingTerms

PIXEL_MEAN = PIXEL_STD = 0.5
"""Bytes become (byte / 255 - mean) / std, from -1 to 1: the defaults of transformers' ViTImageProcessor."""


@dataclass
class NormFreeImageClassifierOutput(TrainingTerms, ImageClassifierOutput):
    """A classifier's output."""


class PatchEmbedding(nn.Module):
    """A linear map of each patch, row by row, behind a learned class token if `pooling` reads one."""

    def __init__(self, config: NormFreeConfig) -> None:
        super().__init__()
        self.shape = (config.num_channels, config.image_size, config.image_size)
        self.patch_size = config.patch_size
        self.projection = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        has_token = config.pooling == "class_token"
        self.class_token = nn.Parameter(torch.empty(config.hidden_size)) if has_token else None

    def forward(self, pixels_BCPP: Tensor) -> Tensor:
        """(B, T, E). Raises ValueError for images of another shape."""
        if pixels_BCPP.shape[1:] != self.shape:
            given, needed = (" x ".join(map(str, shape)) for shape in (pixels_BCPP.shape[1:], self.shape))
            raise ValueError(f"images of {given} (channels, height, width), but the model reads {needed}")
        pixels_BCPP = pixels_BCPP.to(self.projection.weight.dtype)
        rows = pixels_BCPP.unflatten(3, (-1, self.patch_size)).unflatten(2, (-1, self.patch_size))
        tokens_BTE = self.projection(rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        if self.class_token is None:
            return tokens_BTE
        first_B1E = self.class_token.to(tokens_BTE.dtype).expand(len(tokens_BTE), 1, -1)
        return torch.cat([first_B1E, tokens_BTE], dim=1)


class NormFreeVisionModel(NormFreeModel):
    """Patches, blocks and the final norm."""

    config_class = NormFreeVisionConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    is_causal = False

    def build_embedding(self) -> nn.Module:
        return PatchEmbedding(self.config)

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
        passed = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return NormFreeImageClassifierOutput(loss=loss, logits=logits_BK, **passed)
