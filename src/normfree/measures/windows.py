"""Windows of a text for a pretrained model.  N windows, T tokens"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from normfree.measures.text_perplexity import checked_context, encode, spread

DEFAULT_CONTEXT = 1024


def token_windows(
    model: PreTrainedModel, tokenizer: Any, text: str, *, context: int | None, sequences: int, bos: bool | None = None
) -> Tensor:
    """(N, T) token ids: at most `sequences` windows of `context` tokens, spread evenly over the text.

    `context` defaults to the model's limit, at most 1024. A text shorter than that is one window. A BOS token (`bos`:
    see `leading_ids`) begins each window and is one of the `context`. Raises ValueError for fewer than two tokens, a
    context that the model does not allow, ids outside its vocabulary, and a BOS token that does not exist.
    """
    context = checked_context(model, context or min(checked_context(model, None), DEFAULT_CONTEXT))
    encoded, leading, room = encode(model, tokenizer, text, context, bos)
    ids = encoded["input_ids"]
    room = min(room, len(ids))
    windows_NT = torch.tensor(ids[: len(ids) // room * room]).view(-1, room)
    chosen_NT = spread(windows_NT, sequences)
    leading_NT = torch.tensor(leading, dtype=torch.long).expand(len(chosen_NT), -1)
    return torch.cat([leading_NT, chosen_NT], dim=1)


def target_windows(model: PreTrainedModel, tokenizer: Any, text: str, **cut: Any) -> Tensor:
    """(N, T) inputs of a decoder: windows of `token_windows`, moved right behind the token that starts a target."""
    windows_NT = token_windows(model, tokenizer, text, **cut)
    places = model.config, getattr(model, "generation_config", None)  # a model without a head has no such config
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")  # T5 starts with its padding
    known = [getattr(config, name, None) for name in names for config in places]
    start = next((token for token in known if token is not None), None)
    if start is None:
        raise ValueError(f"{type(model).__name__} has no decoder_start_token_id: set it in its config")
    return torch.cat([torch.full_like(windows_NT[:, :1], start), windows_NT[:, :-1]], dim=1)
