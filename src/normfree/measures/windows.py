"""Windows of a text for a pretrained model, and the memory that they need."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from normfree.entropy.probe import ProbeMethod
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
    encoded, leading, room = encode(model, tokenizer, text, default_context(model, context), bos)
    ids = encoded["input_ids"]
    room = min(room, len(ids))
    windows_NT = torch.tensor(ids[: len(ids) // room * room]).view(-1, room)
    chosen_NT = spread(windows_NT, sequences)
    leading_NT = torch.tensor(leading, dtype=torch.long).expand(len(chosen_NT), -1)
    return torch.cat([leading_NT, chosen_NT], dim=1)


def default_context(model: PreTrainedModel, context: int | None) -> int:
    """`context`, or the model's limit, at most 1024. Raises ValueError for what the model does not allow."""
    limit = checked_context(model, context)
    return limit if context else min(limit, DEFAULT_CONTEXT)


def memory_estimate(model: PreTrainedModel, *, batch: int, context: int, method: ProbeMethod) -> int:
    """Rough number of bytes for weights and one forward pass: activations of one layer, and the probe's copies.

    The probe adds queries, keys and outputs in fp32, linear in T. A model in eager attention (gemma2, gpt_oss) makes
    T x T matrices of its own, one layer at a time; method='eager' keeps those of every layer.
    """
    config = model.config.get_text_config()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    width, element = config.hidden_size, next(model.parameters()).element_size()
    inner, heads = _widest(config, "intermediate_size", 4 * width), _widest(config, "num_attention_heads", 0)
    activations = batch * context * (8 * width + 3 * inner) * element
    probe = 4 * batch * context * width * 4
    matrices = batch * heads * context**2 * 4
    if method == "eager":
        probe = config.num_hidden_layers * matrices
    elif model.config._attn_implementation == "eager":
        probe += 3 * matrices  # scores, with the mask, and their softmax
    return weights + activations + probe


def _widest(config: Any, name: str, default: int) -> int:
    """A size of a config that has one number, one for each layer (gemma3n), or none (mamba has no heads)."""
    size = getattr(config, name, None) or default
    return max(size) if isinstance(size, list) else size


def evaluation_estimate(model: PreTrainedModel, *, context: int) -> int:
    """Rough number of bytes for weights and the evaluation of one window: logits, and two blocks of them in float64."""
    logits = context * model.config.get_text_config().vocab_size * next(model.parameters()).element_size()
    return memory_estimate(model, batch=1, context=context, method="auto") + logits + 2 * 2**25


def check_memory(needed: int, device: torch.device, *, advice: str) -> str:
    """Describe in one line the memory that will be needed and that there is; `needed` comes on top of what is in use.

    Raises ValueError, with `advice`, if there is too little.
    """
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    used = torch.cuda.memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    line = f"about {_size(used + needed)} needed by this process, {_size(used + free)} available"
    if needed > free:
        raise ValueError(f"not enough memory: {line}; {advice}")
    return line


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{max(1, round(number / 2**20))} MiB"
