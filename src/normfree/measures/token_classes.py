"""The class of every token of a vocabulary in Python code, by its text alone."""

import keyword
from typing import Any

import torch
from torch import Tensor

CLASSES = ("keyword", "name", "number", "string", "operator", "comment", "whitespace", "other")


def token_classes(tokenizer: Any, size: int | None = None) -> Tensor:
    """(size,) int64: the place in `CLASSES` of each vocabulary id; `size` defaults to the tokenizer's.

    A token has the class of its own text: words inside a string or comment are keywords and names. Special tokens,
    parts of characters, mixtures such as `x.` and ids that the tokenizer does not have are other.
    """
    known = len(tokenizer)
    texts = tokenizer.batch_decode([[number] for number in range(known)], clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    names = ["other" if number in special else class_of(text) for number, text in enumerate(texts)]
    names = (names + ["other"] * ((size or known) - known))[:size]
    return torch.tensor([CLASSES.index(name) for name in names])


def class_of(text: str) -> str:
    """The class of a piece of Python code, with or without blanks around it."""
    bare = text.strip()
    if not bare:
        return "whitespace" if text else "other"
    if bare.startswith("#"):
        return "comment"
    if "'" in bare or '"' in bare:
        return "string"
    if keyword.iskeyword(bare):
        return "keyword"
    if bare.isidentifier():
        return "name"
    if bare[0].isdigit() and bare.replace(".", "").replace("_", "").isalnum():
        return "number"
    is_operator = bare.isascii() and bare.isprintable() and not any(each.isalnum() or each == "_" for each in bare)
    return "operator" if is_operator else "other"
