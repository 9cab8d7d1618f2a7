"""Loss, perplexity and accuracy of the next token, or of the class of an image."""

# B batch, T tokens, V vocabulary; t tokens of one block of logits; N blocks; P parts of a text, R resamples

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from normfree.entropy.statistics import over_processes
from normfree.measures.held_out import blocks_of, in_evaluation_mode, measure_batches
from normfree.measures.measure import Measure, exponential, mean_over_processes

IGNORED = -100
_LARGEST_BLOCK = 2**22  # elements of the logits in float64 at once: 32 MiB, of which cross-entropy holds two
_PROOF_TOKENS = 64
_RESAMPLES = 2000


@dataclass(frozen=True)
class Evaluation:
    """Sums over the predicted tokens of a text."""

    nats: float  # sum of cross-entropies
    tokens: int  # predicted tokens: the first of a text predicts, but is not predicted
    bytes: int = 0  # UTF-8 bytes of the predicted tokens
    parts: tuple[tuple[float, int], ...] = field(default=(), repr=False)  # nats and tokens of each part of the text
    parts_are: Literal["forward passes", "documents"] = "forward passes"
    accuracy: float | None = None  # share of right predictions, if it was measured

    @property
    def unit(self) -> str:
        return "token" if self.accuracy is None else "image"

    @property
    def loss_nats(self) -> float:
        """Mean cross-entropy per predicted token; NaN if there is none."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy; infinite where that overflows a float."""
        return exponential(self.loss_nats)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers; NaN if no byte was counted."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def minus(self, other: Evaluation) -> tuple[float, float]:
        """Difference of the mean losses on the same parts, and its standard error over parts, in nats per token.

        The error is that of a ratio of sums, NaN for one part. Raises ValueError for evaluations of other tokens.
        """
        difference, count = self.loss_nats - other.loss_nats, len(self.parts)
        nats_P, tokens_P = self._above(other)
        squares = np.square(nats_P - difference * tokens_P).sum()
        return difference, math.sqrt(squares * count / (count - 1)) / self.tokens if count > 1 else math.nan

    def interval(self, other: Evaluation | None = None) -> tuple[float, float]:
        """95 % percentile bootstrap over parts of the mean loss, or of its difference to `other`'s, in nats per token.

        It says how much another sample of text would move the number, not another seed. NaN for fewer than two parts.
        Raises ValueError for evaluations of other tokens.
        """
        nats_P, tokens_P = self._above(other)
        count = len(nats_P)
        if count < 2:
            return math.nan, math.nan
        drawn_RP = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
        low, high = np.quantile(drawn_RP @ nats_P / (drawn_RP @ tokens_P), [0.025, 0.975])
        return float(low), float(high)

    def _above(self, other: Evaluation | None) -> np.ndarray:
        """(2, P) nats of each part, above the other's, and its tokens."""
        parts_2P = np.array(self.parts, dtype=np.float64).reshape(-1, 2).T
        if other is not None:
            other_2P = np.array(other.parts, dtype=np.float64).reshape(-1, 2).T
            if not np.array_equal(parts_2P[1], other_2P[1]):
                raise ValueError("the two evaluations are of different tokens; give the same text in the same batches")
            parts_2P[0] -= other_2P[0]
        return parts_2P

    def to_dict(self) -> dict[str, float | int]:
        """The fields of run.json."""
        fields = {name: getattr(self, name) for name in ("loss_nats", "perplexity", "bits_per_byte", "tokens", "bytes")}
        return fields if self.accuracy is None else fields | {"accuracy": self.accuracy}


def cross_entropies(logits_TV: Tensor, targets_T: Tensor, reduction: str) -> list[Tensor]:
    """Cross-entropies in nats of a block of rows each, or their sums; targets of -100 have 0.

    Softmax and sums are in float64, a few rows at a time: in float32 a vocabulary of 262,144 shifts the mean by 1e-5.
    """
    rows = max(1, _LARGEST_BLOCK // logits_TV.shape[-1])
    return [
        F.cross_entropy(logits_tV.double(), targets_t, ignore_index=IGNORED, reduction=reduction)
        for logits_tV, targets_t in zip(logits_TV.split(rows), targets_T.split(rows), strict=True)
    ]


@torch.no_grad()
def sees_later_tokens(model: PreTrainedModel, ids_BT: Tensor) -> bool:
    """True if changing later tokens moves the logits, or last hidden states, of earlier ones by more than rounding.

    The tokens change from an odd place on, where no block of 2, 4, 8, ... tokens ends. Experts regroup their tokens, so
    their rounding is allowed for (1e-5 of the spread in fp32). Our own models are causal by construction, and not run.
    """
    if model.config.model_type == "normfree":
        return False
    ids_BT = ids_BT[:1, :_PROOF_TOKENS].to(next(model.parameters()).device)
    same = (ids_BT.shape[1] // 2) | 1
    changed_BT = ids_BT.clone()
    changed_BT[:, same:] += 1
    changed_BT %= len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    read = model.base_model if model.get_output_embeddings() is None else model
    with in_evaluation_mode(model):
        first, second = (read(input_ids=ids, use_cache=False)[0][:, :same].float() for ids in (ids_BT, changed_BT))
    experts = any("expert" in name for name, _ in model.named_modules())
    rounding = max(1e-4, 8 * torch.finfo(model.dtype).eps * experts)
    return bool((first - second).abs().max() > rounding * first.std())


class NextToken(Measure):
    """Base of measures of next-token predictions, each from the tokens before it in its row, or of classes of images.

    Of an encoder-decoder the tokens are those of the target, given as `labels` beside `decoder_input_ids`. Raises
    ValueError, before the first pass, for a model that sees later tokens.
    """

    needs_logits = True

    def attach(self) -> list[RemovableHandle]:
        return [self.model.register_forward_hook(self._read, with_kwargs=True)]

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        model = cast(PreTrainedModel, self.model)
        if model.main_input_name == "pixel_values":
            if "labels" not in inputs and "input_ids" not in inputs:
                raise ValueError("losses of images need their classes as `labels`: leave this measure out")
            return
        has_head, is_seq2seq = model.get_output_embeddings() is not None, "decoder_input_ids" in inputs
        if has_head and is_seq2seq and "labels" in inputs:
            return
        if not has_head or is_seq2seq or "input_ids" not in inputs:
            raise ValueError("losses need input_ids alone and a causal language-model head: leave this measure out")
        if sees_later_tokens(model, inputs["input_ids"]):
            raise ValueError(
                f"{type(model).__name__} is not causal: later tokens change its predictions of earlier ones, so "
                "it has no perplexity; `normfree measure` shows its heads (BERT is causal with is_decoder=true)"
            )

    def _read(self, _model: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if "decoder_input_ids" in named or output.logits.dim() == 2:
            # The labels do not begin with the token that starts the target. Images are one row of classes.
            logits, labels = F.pad(output.logits, (0, 0, 0, 1)), F.pad(self.inputs["labels"], (1, 0), value=IGNORED)
            self.add(logits.view(-1, *logits.shape[-2:]), torch.atleast_2d(labels))
            return
        labels_BT = self.inputs["labels"] if "labels" in self.inputs else named["input_ids"]
        if (mask_BT := self.mask_of(0)) is not None:  # padding is not predicted, nor is anything predicted from it
            known_BT = mask_BT != 0
            known_BT = torch.cat([known_BT[:, :1], known_BT[:, 1:] & known_BT[:, :-1]], dim=1)
            labels_BT = labels_BT.masked_fill(~known_BT, IGNORED)
        self.add(output.logits, labels_BT)

    def add(self, logits_BTV: Tensor, labels_BT: Tensor) -> None:
        """Add the predictions of a pass: logits at t are of the label at t + 1; labels of -100 do not count."""
        raise NotImplementedError


class Perplexity(NextToken):
    """Loss and perplexity of all tokens, each predicted from those before it in its row."""

    gives = ("loss", "perplexity")

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.nats, self.tokens = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        self.passes: list[tuple[float, int]] = []  # nats and tokens of each

    def add(self, logits_BTV: Tensor, labels_BT: Tensor) -> None:
        total = torch.zeros((), dtype=torch.float64, device=logits_BTV.device)
        for logits_TV, targets_T in zip(logits_BTV[:, :-1], labels_BT[:, 1:], strict=True):
            for nats in cross_entropies(logits_TV, targets_T, "sum"):
                total += nats
        nats, tokens = total.item(), int((labels_BT[:, 1:] != IGNORED).sum())
        self.nats, self.tokens = self.nats + nats, self.tokens + tokens
        self.passes.append((nats, tokens))

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        loss = mean_over_processes(self.nats, self.tokens, device)
        return {"loss": loss, "perplexity": torch.tensor(exponential(loss.item()), dtype=torch.float64)}

    def evaluation(self, *, predicted_bytes: int, device: torch.device | str | None = None) -> Evaluation:
        """Sums over processes that share the text on `device`, the bytes of all of it, and the passes of this one."""
        nats, tokens = over_processes(self.nats, device), over_processes(self.tokens, device)
        return Evaluation(nats.item(), int(tokens), predicted_bytes, tuple(self.passes))


class TokenLosses(NextToken):
    """The losses in nats of the predicted tokens of every row, in float64; labels of -100 are behind them."""

    gives = ()

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.rows: list[np.ndarray] = []

    def add(self, logits_BTV: Tensor, labels_BT: Tensor) -> None:
        for logits_TV, targets_T in zip(logits_BTV[:, :-1], labels_BT[:, 1:], strict=True):
            known = int((targets_T != IGNORED).sum())
            self.rows.append(torch.cat(cross_entropies(logits_TV[:known], targets_T[:known], "none")).cpu().numpy())


class Accuracy(NextToken):
    """Share of predictions whose most likely token, or class, is right; NaN as soon as a logit of one is NaN."""

    gives = ("accuracy",)

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.right, self.predictions = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)

    def add(self, logits_BTV: Tensor, labels_BT: Tensor) -> None:
        logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
        right_BT = (logits_BTV.argmax(-1) == labels_BT).double().where(~logits_BTV.isnan().any(-1), torch.nan)
        counts_BT = labels_BT != IGNORED
        self.right = self.right + right_BT[counts_BT].sum().cpu()
        self.predictions = self.predictions + counts_BT.sum().cpu()

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        return {"accuracy": mean_over_processes(self.right, self.predictions, device)}


def evaluate_blocks(
    model: PreTrainedModel,
    blocks_NT: Tensor,
    *,
    predicted_bytes: int = 0,
    batch_sequences: int = 32,
    documents_NT: np.ndarray | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate full blocks of token ids, each predicted from its own start, or images; processes share the blocks.

    `predicted_bytes` is the sum over all blocks. With `documents_NT`, the document of each token, the parts of the
    result are documents; one process alone can tell them. Raises ValueError for a model that sees later tokens.
    """
    measure, accuracy, losses = Perplexity(model), Accuracy(model), TokenLosses(model)
    measures = [measure, accuracy] if model.main_input_name == "pixel_values" else [measure]
    measures += [] if documents_NT is None else [losses]
    batches = blocks_of(model, blocks_NT, batch_sequences, measures)
    measure_batches(model, batches, measures, progress="evaluating" if progress else None)
    device = next(model.parameters()).device
    result = measure.evaluation(predicted_bytes=predicted_bytes, device=device)
    if accuracy in measures:
        result = replace(result, accuracy=accuracy.pooled(device)["accuracy"].item())
    if documents_NT is not None:
        numbers = np.unique(documents_NT[:, 1:], return_inverse=True)[1].reshape(-1)
        nats_P = np.bincount(numbers, weights=np.concatenate(losses.rows))
        parts = tuple(zip(nats_P.tolist(), np.bincount(numbers).tolist(), strict=True))
        result = replace(result, parts=parts, parts_are="documents")
    return result
