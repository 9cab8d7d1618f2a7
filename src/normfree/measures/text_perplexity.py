"""Windows of a text for any model, and the perplexity and bits per byte of a causal one, weighted by token."""

# B batch, T tokens, N blocks

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from normfree.measures.held_out import measure_batches
from normfree.measures.perplexity import IGNORED, Evaluation, Perplexity

DEFAULT_CONTEXT = 1024
_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length", "max_sequence_length")
_LIMITS += ("seq_length", "model_max_length", "context_length", "max_target_positions")
"""Names of the longest context in configs of transformers and of code that comes with a model."""


def perplexity(
    model: PreTrainedModel,
    tokenizer,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    sequences: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """The `Evaluation` of one text, with perplexity and bits per byte, in windows of `context` tokens.

    Windows advance by `stride` (default: their own length, without overlap). Every token is predicted exactly once,
    from the tokens before it in its window. Without a BOS token the first token of the text, and of each window if
    windows do not overlap, is not predicted. A smaller stride gives each token more context and costs context / stride
    times as much. `bos`: see `leading_ids`; the BOS token is one of the `context` tokens and is not counted.
    `sequences`: at most so many windows, spread evenly over the text. bits_per_byte counts the UTF-8 bytes of predicted
    tokens only, and none with a tokenizer that gives no offsets (written in Python).

    Raises ValueError if the text has fewer than two tokens, context, stride or bos do not fit model and tokenizer, or
    the model sees later tokens.
    """
    encoded, leading, room = encode(model, tokenizer, text, checked_context(model, context), bos)
    ids, spans = encoded["input_ids"], encoded.get("offset_mapping")
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        raise ValueError(f"stride={stride} must be between 1 and the tokens of text in a window, {room}")
    ends = [*(stop for _, stop in spans[:-1]), len(text)] if spans else []  # some spans leave out blanks
    windows, sizes, end = [], [], 0
    for start in range(0, max(0, len(ids) - room) + stride, stride):
        # Nothing predicts the first token of the text, or of a window without overlap, but a leading token.
        first, end = max(end, start if leading else start + 1), min(start + room, len(ids))
        if first == end:
            continue
        ids_BT = torch.tensor([leading + ids[start:end]])
        labels_BT = ids_BT.clone()
        labels_BT[:, : len(leading) + first - start] = IGNORED
        windows.append({"input_ids": ids_BT, "labels": labels_BT})
        # Counted from the end of the token before: some offsets leave out the blank before a word.
        sizes.append(len(text[ends[first - 1] if first else 0 : ends[end - 1]].encode()) if ends else 0)
    chosen = range(len(windows)) if sequences is None else spread_places(len(windows), sequences)
    measure = Perplexity(model)
    batches = [windows[place] for place in chosen]
    measure_batches(model, batches, [measure], progress="evaluating" if progress else None)
    return measure.evaluation(predicted_bytes=sum(sizes[place] for place in chosen))


def encode(
    model: PreTrainedModel, tokenizer: Any, text: str, context: int, bos: bool | None
) -> tuple[Any, list[int], int]:
    """Tokenize a text for windows of `context` tokens: the encoding, leading ids, and tokens of text in a window.

    Raises ValueError for fewer than two tokens, a context without room for text, and ids outside the vocabulary.
    """
    leading = leading_ids(model, tokenizer, bos)
    if context <= len(leading):
        raise ValueError(f"context={context} leaves no room for text behind {len(leading)} leading tokens")
    offsets = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, **offsets)
    ids = encoded["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} token(s); at least 2 are needed to predict one")
    rows, highest = _vocabulary(model), max(leading + ids)
    if highest >= rows:
        raise ValueError(f"the tokenizer gives token {highest}, but the model's vocabulary has {rows}: use its own")
    return encoded, leading, context - len(leading)


def _vocabulary(model: PreTrainedModel) -> int:
    try:
        return len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    except NotImplementedError:  # a text tower beside one of images
        return model.config.get_text_config().vocab_size


def leading_ids(model: PreTrainedModel, tokenizer: Any, bos: bool | None) -> list[int]:
    """What begins every window: the BOS token or nothing; with `bos=None` what the tokenizer puts before texts.

    Llama, Gemma and Mistral predict badly without one; ours never see one. Raises ValueError for bos=True without one.
    """
    if bos is None and model.config.model_type != "normfree":
        text, plain = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
        starts = [start for start in range(len(text)) if text[start : start + len(plain)] == plain]
        return text[: starts[0]] if starts else []
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=true, but the tokenizer has no BOS token")
    return [tokenizer.bos_token_id] if bos else []


def checked_context(model: nn.Module, context: int | None) -> int:
    """`context`, or the model's limit. Raises ValueError if it is below 2 or longer than the model allows."""
    config = cast(Any, model.config).get_text_config()
    limits = [getattr(config, name, None) for name in _LIMITS]
    limit = next((limit for limit in limits if isinstance(limit, int) and limit > 0), 0)  # XLNet says -1
    for name, part in model.named_modules():
        if limit and "position" in name and isinstance(part, nn.Embedding) and part.num_embeddings == limit:
            if part.padding_idx is not None:  # RoBERTa's positions begin behind that of padding
                limit -= part.padding_idx + 1
            break
    if context is None:
        return limit or 1024
    if context < 2 or (limit and context > limit):
        raise ValueError(f"context={context} must be between 2 and the model's {limit or 'own limit'}")
    return context


def spread(blocks_NT: Tensor, count: int) -> Tensor:
    """At most `count` blocks, evenly spread over all, so that a small sample has parts of every document group."""
    return blocks_NT[spread_places(len(blocks_NT), count)]


def spread_places(length: int, count: int) -> list[int]:
    """At most `count` of 0 .. length - 1, evenly spread."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def token_windows(
    model: PreTrainedModel, tokenizer: Any, text: str, *, context: int | None, sequences: int, bos: bool | None = None
) -> Tensor:
    """(N, T) token ids: at most `sequences` windows of `context` tokens, spread evenly over the text.

    `context` defaults to the model's limit, at most 1024. A text shorter than that is one window. A BOS token (`bos`:
    see `leading_ids`) begins each window and is one of the `context`. Raises ValueError as `perplexity` does.
    """
    context = min(checked_context(model, None), DEFAULT_CONTEXT) if context is None else checked_context(model, context)
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
