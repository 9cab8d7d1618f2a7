"""Units of every feed-forward part: how many are sparse or dead, and how selective they are for classes of tokens."""

# N tokens, V vocabulary, C classes, F features (units), E exponents, B bins of magnitudes

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from normfree.measures.histogram import counts_of_columns
from normfree.measures.reading import FeatureMeasure, real_tokens
from normfree.measures.token_classes import token_classes

EXPONENTS = 256  # of a float32; the last is that of infinity and NaN
OCTAVES = 10  # a feature is small if it is below 2^-OCTAVES (about 1e-3) of its unit's largest
BINS = 256  # of magnitudes: eight an octave from 2^-20 to 2^12; what is beyond is in the first or the last
LOWEST = (127 - 20) << 3


class Units(FeatureMeasure):
    """Shares of zero, small and dead among the activated features, over all tokens of a measurement.

    A unit's largest magnitude is known only at the end, so each unit keeps a histogram of its exponents, exact for
    magnitudes rounded down to powers of two.
    """

    gives = ("zero_share", "small_share", "dead_share", "unit_tokens")

    def read_after(self, layer: int, features_NF: Tensor) -> None:
        features_NF = features_NF.float().contiguous()
        codes_NF = features_NF.view(torch.int32).bitwise_right_shift(23).bitwise_and_(EXPONENTS - 1)
        exponents_FE = counts_of_columns(codes_NF, EXPONENTS)
        self.add(layer, exponents=exponents_FE, zeros=(features_NF == 0).sum(0), positive=(features_NF > 0).sum(0))

    def values(self, exponents: Tensor, zeros: Tensor, positive: Tensor) -> dict[str, Tensor]:
        tokens = exponents[0].sum().double()
        number_E = torch.arange(EXPONENTS)
        highest_F1 = (number_E * (exponents > 0)).amax(1, keepdim=True)
        small_F = (exponents * (number_E < highest_F1 - OCTAVES)).sum(1)
        shares = [zeros.double().mean() / tokens, small_F.double().mean() / tokens, (positive == 0).double().mean()]
        if exponents[:, -1].any():  # a NaN or infinity
            shares = [tokens * torch.nan] * 3
        return dict(zip(self.gives, [*shares, tokens], strict=True))


class Selectivity(FeatureMeasure):
    """Selectivity of the magnitude of each activated feature for the class of its token, beside shuffled labels.

    For each unit: the index (mu_max - mu_rest) / (mu_max + mu_rest) over class means, mu_rest the mean over the other
    classes (Morcos et al., arXiv 1803.06959), and the area under the ROC curve of the class with the largest, against
    all other tokens. Areas come from histograms of `BINS` bins: they are off by at most half of the share of pairs that
    share a bin. The control has the same labels, shuffled among the tokens of a pass.

    classes: (V,) the class of each vocabulary id, a number from 0 on; default: `token_classes` of the tokenizer. Raises
    ValueError without either, and for a table of another size.
    """

    gives = ("selectivity_index", "selectivity_index_shuffled", "selectivity_area", "selectivity_area_shuffled")
    needs_tokenizer = True

    def __init__(self, model: nn.Module, classes: Tensor | None = None, tokenizer: Any = None) -> None:
        super().__init__(model)
        weight = getattr(cast(Any, model).get_input_embeddings(), "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(f"{type(model).__name__} has no vocabulary, so no classes: leave this measure out")
        rows = len(weight)
        if classes is None:
            if tokenizer is None:
                raise ValueError("give tokenizer=, or selectivity={'classes': a tensor with the class of each id}")
            classes = token_classes(tokenizer, rows)
        if classes.shape != (rows,) or classes.min() < 0:
            raise ValueError(f"classes has shape {tuple(classes.shape)}; give 0, 1, 2, ... for each of the {rows} ids")
        self._classes_V, self._number = classes.long(), int(classes.max()) + 1
        self._shuffling = torch.Generator().manual_seed(0)
        # Of the current pass, by the argument that has the ids: real and shuffled, each (N,).
        self._labels: dict[str, list[Tensor]] = {}

    def attach(self) -> Iterator[AbstractContextManager[Any]]:
        yield from super().attach()
        base: nn.Module = getattr(self.model, "base_model", self.model)  # which runs alone where no logits are needed
        yield base.register_forward_pre_hook(self._read_ids, with_kwargs=True)

    def _read_ids(self, _model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        arguments = {"input_ids": inputs[0]} | named if inputs else named
        self._labels = {}
        for name, stack in (("input_ids", "encoder"), ("decoder_input_ids", "decoder")):
            if isinstance(ids := arguments.get(name), Tensor):
                labels_N = self._classes_V[real_tokens(ids[..., None], self.mask_of(f"{stack} 0")).flatten().cpu()]
                self._labels[name] = [labels_N, labels_N[torch.randperm(len(labels_N), generator=self._shuffling)]]

    def read_after(self, layer: int, features_NF: Tensor) -> None:
        has_own = str(self.layers[layer]).startswith("decoder") and "decoder_input_ids" in self._labels
        labels_2N = self._labels.get("decoder_input_ids" if has_own else "input_ids", [])
        if not labels_2N or len(labels_2N[0]) != len(features_NF):
            raise ValueError(
                f"selectivity knows the class of {len(labels_2N[0]) if labels_2N else 0} tokens, but layer "
                f"{self.layers[layer]} has {len(features_NF)}: run the model on input_ids"
            )
        magnitude_NF = features_NF.float().abs()
        width = magnitude_NF.shape[1]
        sums = self.sums[layer]
        if not sums:  # the first axis is real and shuffled labels; counts of magnitudes are by bin
            sums["magnitudes"] = torch.zeros(2, self._number, width, dtype=torch.float64)
            sums["counts"] = torch.zeros(2, self._number, width, BINS, dtype=torch.int64)
        codes_NF = (magnitude_NF.contiguous().view(torch.int32) >> 20).sub_(LOWEST).clamp_(0, BINS - 1)
        for labelling, labels_N in enumerate(labels_2N):
            for label in labels_N.unique().tolist():
                rows = (labels_N == label).nonzero().flatten().to(codes_NF.device)
                sums["magnitudes"][labelling, label] += magnitude_NF[rows].sum(0, dtype=torch.float64).cpu()
                sums["counts"][labelling, label] += counts_of_columns(codes_NF[rows], BINS).cpu()

    def values(self, magnitudes: Tensor, counts: Tensor) -> dict[str, Tensor]:
        values_22 = torch.stack([_selectivity(*of_labels) for of_labels in zip(magnitudes, counts, strict=True)])
        return dict(zip(self.gives, values_22.T.flatten(), strict=True))


def _selectivity(sums_CF: Tensor, counts_CFB: Tensor) -> Tensor:
    """(2,) float64: means over units of the index and of the best class's area; NaN if a feature is, or with one class.

    A unit without any activity has index 0 and area 1/2.
    """
    tokens_C = counts_CFB[:, 0].sum(1)
    sums_CF, counts_CFB, tokens_C = (part[tokens_C > 0].double() for part in (sums_CF, counts_CFB, tokens_C))
    if len(tokens_C) < 2 or not sums_CF.isfinite().all():
        return torch.full((2,), torch.nan, dtype=torch.float64)
    mean_CF = sums_CF / tokens_C[:, None]
    highest_F = mean_CF.amax(0)
    rest_F = (mean_CF.sum(0) - highest_F) / (len(tokens_C) - 1)
    index_F = torch.where(highest_F > 0, (highest_F - rest_F) / (highest_F + rest_F), 0.0)
    others_CFB = counts_CFB.sum(0) - counts_CFB
    below_CFB = others_CFB.cumsum(-1) - others_CFB / 2  # a pair in one bin counts as half
    pairs_C = tokens_C * (tokens_C.sum() - tokens_C)
    area_F = ((counts_CFB * below_CFB).sum(-1) / pairs_C[:, None]).amax(0)
    return torch.stack([index_F.mean(), area_F.mean()])
