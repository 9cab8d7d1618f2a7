"""How well the next token is predicted."""

# B batch, T tokens, V vocabulary

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from normfree.measures.held_out import blocks_of, measure_batches
from normfree.measures.measure import Measure, Total, exponential, reduced

IGNORED = -100


@dataclass(frozen=True)
class Evaluation:
    """Sums over predicted tokens; `a + b` merges two texts or two processes."""

    nats: float
    """Sum of cross-entropies."""
    tokens: int
    """Predicted tokens: the first of a text predicts, but is not predicted."""
    bytes: int = 0
    """UTF-8 bytes of the predicted tokens."""

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def loss_nats(self) -> float:
        """Mean cross-entropy per predicted token; NaN where there is none."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy; infinite where that overflows a float."""
        return exponential(self.loss_nats)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers; NaN where no byte was counted."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def to_dict(self) -> dict[str, float | int]:
        """For run.json and the command line."""
        return {
            "loss_nats": self.loss_nats,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def next_token_nats(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[float, int]:
    """Sum of next-token cross-entropies (nats, added in float64) and their number; labels of -100 do not count."""
    logits_BTV, wanted_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), wanted_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.double().sum().item(), int((wanted_BT != IGNORED).sum())


class Perplexity(Measure):
    """Loss and perplexity of the tokens that pass by, each predicted from those before it in its row."""

    gives = ("loss", "perplexity")
    needs_logits = True

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.nats, self.tokens = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        self._labels_BT: Tensor | None = None

    def __enter__(self) -> Self:
        self._hook = self.model.register_forward_hook(self._add, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def expect(self, labels_BT: Tensor | None) -> None:
        self._labels_BT = labels_BT

    def _add(self, _model: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        ids_BT = named["input_ids"] if "input_ids" in named else positional[0]
        nats, tokens = next_token_nats(output.logits, ids_BT if self._labels_BT is None else self._labels_BT)
        self.nats, self.tokens = self.nats + nats, self.tokens + tokens

    def totals(self) -> dict[str, Total]:
        return dict.fromkeys(self.gives, (self.nats, self.tokens))

    def evaluation(self, *, predicted_bytes: int, device: torch.device | str = "cpu") -> Evaluation:
        """Sums over all processes, with the bytes of all predicted tokens, for perplexity and bits per byte."""
        nats, tokens = reduced(self.nats, device), reduced(self.tokens, device)
        return Evaluation(nats.item(), int(tokens), predicted_bytes)


def evaluate_blocks(
    model: PreTrainedModel,
    blocks_NT: Tensor,
    *,
    predicted_bytes: int = 0,
    batch_sequences: int = 32,
    progress: bool = False,
) -> Evaluation:
    """Evaluate full blocks of token ids, each predicted from its own start; processes share the blocks.

    `predicted_bytes` is the sum over all blocks. Logits are in the precision of the model, sums in fp64.
    """
    measure = Perplexity(model)
    batches = blocks_of(model, blocks_NT, batch_sequences, [measure])
    measure_batches(model, batches, [measure], progress="evaluating" if progress else None)
    return measure.evaluation(predicted_bytes=predicted_bytes, device=next(model.parameters()).device)
