"""What one forward pass over a full block of tokens computes: every operation that costs communication.

Sums, biases, the causal mask and the scale of the attention scores (it folds into the query weights) are local in
every protocol here and are left out. The mask is public, yet the softmax works on whole rows, as SPU does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from normfree.cost.families import Architecture


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One call of an operation on `rows` rows of `length` elements."""

    layer: int | None
    """None outside the blocks."""
    part: str
    operation: str
    rows: int
    length: int

    @property
    def elements(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """`batch` products of an m x k with a k x n matrix, in one call; `operation` is one of `PRODUCTS`."""

    layer: int | None
    part: str
    operation: str
    batch: int
    m: int
    k: int
    n: int

    @property
    def left(self) -> int:
        return self.batch * self.m * self.k

    @property
    def right(self) -> int:
        return self.batch * self.k * self.n

    @property
    def elements(self) -> int:
        """Elements of the result."""
        return self.batch * self.m * self.n


Count = Rows | Matmul
PRODUCTS = ("embedding", "matmul", "attention_product")
"""Operations of a `Matmul`; all others work on `Rows`."""


def count(model: Architecture, context: int) -> list[Count]:
    """All operations of one sequence of `context` tokens, in order. Raises ValueError for a context out of range."""
    if not 1 <= context <= model.max_tokens:
        raise ValueError(f"context={context} must be 1 to {model.max_tokens}, the longest sequence of this model")
    counts: list[Count] = [_linear(None, "embedding", context, model.vocab_size, model.width, operation="embedding")]
    for layer in range(model.layers):
        counts += _attention(model, layer, context)
        counts += _feed_forward(model, layer, context)
    counts += _elementwise(None, "final norm", model.final_norm, context, model.width)
    return [*counts, _linear(None, "head", context, model.width, model.vocab_size)]


def _attention(model: Architecture, layer: int, context: int) -> Iterator[Count]:
    queries, keys = model.query_heads * model.head_dim, model.key_heads * model.head_dim
    yield from _elementwise(layer, "norm", model.norm, context, model.width)
    yield _linear(layer, "attention", context, model.width, queries + 2 * keys)
    if model.rotary_dim:
        # x * cos + turned(x) * sin with public angles: two products per element that rotates.
        rotated = 2 * (model.query_heads + model.key_heads) * model.rotary_dim
        yield from _elementwise(layer, "rotary", ("public_product",), context, rotated)
    heads = {"layer": layer, "part": "attention", "operation": "attention_product", "batch": model.query_heads}
    yield Matmul(**heads, m=context, k=model.head_dim, n=context)
    yield from _elementwise(layer, "attention", ("softmax",), model.query_heads * context, context)
    yield Matmul(**heads, m=context, k=context, n=model.head_dim)
    yield _linear(layer, "attention", context, queries, model.width)


def _feed_forward(model: Architecture, layer: int, context: int) -> Iterator[Count]:
    width = model.feed_forward
    yield from _elementwise(layer, "norm", model.norm, context, model.width)
    yield _linear(layer, "feed-forward", context, model.width, 2 * width if model.gated else width)
    yield from _elementwise(layer, "activation", model.activations[layer], context, width)
    if model.gated:
        yield from _elementwise(layer, "gate", ("product",), context, width)
    yield _linear(layer, "feed-forward", context, width, model.width)


def _linear(layer: int | None, part: str, m: int, k: int, n: int, operation: str = "matmul") -> Matmul:
    return Matmul(layer=layer, part=part, operation=operation, batch=1, m=m, k=k, n=n)


def _elementwise(layer: int | None, part: str, names: tuple[str, ...], rows: int, length: int) -> Iterator[Rows]:
    for name in names:
        yield Rows(layer=layer, part=part, operation=name, rows=rows, length=length)
