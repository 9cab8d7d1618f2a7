"""What a model reads, and its inputs from images."""

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

_KINDS = {"input_ids": {"text"}, "pixel_values": {"images"}}
_READS = {"text": "a text", "images": "images", "target": "the target of an encoder-decoder"}


def kinds_read(model: PreTrainedModel) -> set[str]:
    """Kinds of inputs of a forward pass: text, images, target (the decoder's text). Raises ValueError for others."""
    if model.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not model.config.is_encoder_decoder:
        return {"text"}
    arguments = inspect.signature(model.forward).parameters
    has_towers = model.config.model_type in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if has_towers and _KINDS.keys() <= arguments.keys():
        return {"text", "images"}
    if model.main_input_name not in _KINDS:
        reads = f"{type(model).__name__} reads {model.main_input_name}, which the command has no key for"
        raise ValueError(f"{reads}; in Python: normfree.measure(model, {{'{model.main_input_name}': ...}})")
    target = {"target"} if model.config.is_encoder_decoder and "decoder_input_ids" in arguments else set()
    return _KINDS[model.main_input_name] | target


def check_kinds(model: PreTrainedModel, given: set[str]) -> None:
    """Raise ValueError for a key of the command that the model has no use for, or a missing one."""
    kinds = kinds_read(model)
    needs = " and ".join(f"{kind}=" for kind in _READS if kind in kinds)
    for kind in _READS:
        if kind in given - kinds:
            raise ValueError(f"{kind}= is {_READS[kind]}, and {type(model).__name__} reads none: give {needs}")
        if kind in kinds - given:
            raise ValueError(f"{type(model).__name__} reads {_READS[kind]}: give {needs}")


def read_images(folder: Path, processor: Any, count: int, channels: int = 3) -> dict[str, Tensor]:
    """Read the first images below a folder through a processor, grey for 1 channel. Raises ValueError for no image."""
    from PIL.Image import open as decode_image
    from PIL.Image import registered_extensions

    from normfree.data.images import visible_images

    paths = visible_images(folder, registered_extensions())[:count]
    if not paths:
        raise ValueError(f"images={folder} holds no image; give a folder of files such as .png or .jpg")
    images = []
    for path in paths:
        try:
            with decode_image(path) as image:
                images.append(image.convert("L" if channels == 1 else "RGB"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image ({error})") from None
    return dict(processor(images=images, return_tensors="pt"))
