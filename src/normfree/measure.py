"""Windows of a text for a pretrained model, and the memory that they need."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from normfree.entropy.probe import ProbeMethod
from normfree.evaluate import check_vocabulary, checked_context, leading_ids, room_for_text, spread

DEFAULT_CONTEXT = 1024


def token_windows(
    model: PreTrainedModel, tokenizer: Any, text: str, *, context: int | None, sequences: int, bos: bool | None = None
) -> Tensor:
    """(N, T) token ids: at most `sequences` windows of `context` tokens, spread evenly over the text.

    `context` defaults to the model's limit, at most 1024. A text shorter than that is one window. With a BOS token
    (`bos`: see `leading_ids`) each window begins with it, and it is one of the `context`. Raises ValueError for fewer
    than two tokens, a context that the model does not allow, ids outside its vocabulary, and a BOS that is not there.
    """
    if sequences < 1:
        raise ValueError(f"sequences={sequences} must be at least 1")
    context = min(checked_context(model, None), DEFAULT_CONTEXT) if context is None else checked_context(model, context)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} token(s); at least 2 are needed")
    leading = leading_ids(model, tokenizer, bos)
    check_vocabulary(model, leading + ids)
    room = min(room_for_text(context, leading), len(ids))
    windows_NT = torch.tensor(ids[: len(ids) // room * room]).view(-1, room)
    chosen_NT = spread(windows_NT, sequences)
    leading_NT = torch.tensor(leading, dtype=torch.long).expand(len(chosen_NT), -1)
    return torch.cat([leading_NT, chosen_NT], dim=1)


def memory_estimate(model: PreTrainedModel, *, batch: int, context: int, method: ProbeMethod) -> int:
    """Bytes that weights and one forward pass will need, roughly: activations of one layer, and the probe's copies.

    The probe adds queries, keys and outputs in fp32, linear in T. A model in eager attention (gemma2, gpt_oss) makes
    T x T matrices of its own, one layer at a time; method='eager' keeps those of every layer.
    """
    config = model.config.get_text_config()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    width, element = config.hidden_size, next(model.parameters()).element_size()
    inner = getattr(config, "intermediate_size", None) or 4 * width
    inner = max(inner) if isinstance(inner, list) else inner  # gemma3n: one a layer
    activations = batch * context * (8 * width + 3 * inner) * element
    probe = 4 * batch * context * width * 4
    matrices = batch * config.num_attention_heads * context**2 * 4
    if method == "eager":
        probe = config.num_hidden_layers * matrices
    elif model.config._attn_implementation == "eager":
        probe += 3 * matrices  # scores, with the mask, and their softmax
    return weights + activations + probe


def evaluation_estimate(model: PreTrainedModel, *, context: int) -> int:
    """Bytes that weights and the evaluation of one window need, roughly: logits, their fp32 copy and its softmax."""
    logits = 3 * context * model.config.get_text_config().vocab_size * 4
    return memory_estimate(model, batch=1, context=context, method="auto") + logits


def check_memory(needed: int, model: PreTrainedModel, *, advice: str) -> str:
    """One line on what will be needed and what there is. Raises ValueError, with `advice`, when that is too little."""
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    line = f"about {needed / 2**30:.2f} GiB needed, {free / 2**30:.1f} GiB free"
    if needed > free:
        raise ValueError(f"not enough memory: {line}; {advice}")
    return line
