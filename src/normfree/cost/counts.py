"""The operations of one forward pass over a full block of tokens that cost communication.

Sums, biases, the causal mask and the scale of the attention scores (which folds into the query weights) are free in
every protocol here and are left out. The mask is public, yet the softmax works on whole rows, as in SPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from normfree.cost.families import Architecture


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One call of an operation on `rows` rows of `length` elements."""

    layer: int | None  # None outside the blocks
    part: str
    operation: str
    rows: int
    length: int

    @property
    def elements(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """`batch` products of an m x k with a k x n matrix, in one call; all other operations are `Rows`."""

    layer: int | None
    part: str
    operation: str = "matmul"
    batch: int = 1
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
        return self.batch * self.m * self.n  # of the result


Count = Rows | Matmul


def count(model: Architecture, context: int) -> list[Count]:
    """All operations of one sequence of `context` tokens, in order. Raises ValueError for a context out of range."""
    if not 1 <= context <= model.max_tokens:
        raise ValueError(f"context={context} must be 1 to {model.max_tokens}, the longest sequence of this model")
    counts: list[Count] = [
        Matmul(layer=None, part="embedding", operation="embedding", m=context, k=model.vocab_size, n=model.width)
    ]
    for layer in range(model.layers):
        counts += _attention(model, layer, context)
        counts += _feed_forward(model, layer, context)
    counts += _rows(None, "final norm", model.final_norm, context, model.width)
    counts.append(Matmul(layer=None, part="head", m=context, k=model.width, n=model.vocab_size))
    return [*counts, *_rows(None, "logits soft-cap", model.logits_cap, context, model.vocab_size)]


def _attention(model: Architecture, layer: int, context: int) -> Iterator[Count]:
    queries, keys = model.query_heads * model.head_dim, model.key_heads * model.head_dim
    yield from _rows(layer, "norm", model.norm, context, model.width)
    yield Matmul(layer=layer, part="attention", m=context, k=model.width, n=queries + 2 * keys)
    heads_of_both = model.query_heads + model.key_heads
    yield from _rows(layer, "query and key norm", model.query_key_norm, heads_of_both * context, model.head_dim)
    if model.rotary_dim:
        # x * cos + turned(x) * sin with public angles: two products per rotated element.
        rotated = 2 * heads_of_both * model.rotary_dim
        yield from _rows(layer, "rotary", ("public_product",), context, rotated)
    heads = {"layer": layer, "part": "attention", "operation": "attention_product", "batch": model.query_heads}
    yield Matmul(**heads, m=context, k=model.head_dim, n=context)
    yield from _rows(layer, "scores soft-cap", model.scores_cap, model.query_heads * context, context)
    yield from _rows(layer, "attention", ("softmax",), model.query_heads * context, context)
    yield Matmul(**heads, m=context, k=context, n=model.head_dim)
    yield Matmul(layer=layer, part="attention", m=context, k=queries, n=model.width)
    yield from _rows(layer, "norm", model.post_norm, context, model.width)


def _feed_forward(model: Architecture, layer: int, context: int) -> Iterator[Count]:
    width = model.feed_forward
    yield from _rows(layer, "norm", model.norm, context, model.width)
    yield Matmul(layer=layer, part="feed-forward", m=context, k=model.width, n=2 * width if model.gated else width)
    yield from _rows(layer, "activation", model.activations[layer], context, width)
    if model.gated:
        yield from _rows(layer, "gate", ("product",), context, width)
    yield Matmul(layer=layer, part="feed-forward", m=context, k=width, n=model.width)
    yield from _rows(layer, "norm", model.post_norm, context, model.width)


def _rows(layer: int | None, part: str, operations: tuple[str, ...], rows: int, length: int) -> Iterator[Rows]:
    for operation in operations:
        yield Rows(layer=layer, part=part, operation=operation, rows=rows, length=length)
