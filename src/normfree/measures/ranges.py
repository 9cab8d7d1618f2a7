"""What enters every nonlinearity: extremes and extreme quantiles, by layer."""

# L layers, B bins, N tokens, F features

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normfree.entropy.layers import HeadLayer, labels
from normfree.entropy.routing import AttentionCall
from normfree.entropy.statistics import over_processes
from normfree.entropy.tap import AttentionTap
from normfree.measures.features import FeatureMeasure, real_tokens
from normfree.measures.histogram import BINS, float_counts, quantiles
from normfree.measures.measure import Total, merged
from normfree.measures.places import Label, Place
from normfree.measures.scores import scores_of

LAYER_SITES = ("softmax_input", "activation_input", "attention_norm_input", "feed_forward_norm_input")
SITES = (*LAYER_SITES, "final_norm_input")
QUANTILES = {"low": 1e-4, "high": 1 - 1e-4}


class Range:
    """Smallest, largest and a histogram of values, over all passes."""

    def __init__(self) -> None:
        self.lowest, self.highest = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, lowest: Tensor, highest: Tensor, counts: Tensor) -> None:
        """Add values by their extremes, NaN if one of them is, and their `float_counts`."""
        self.lowest = torch.minimum(self.lowest, lowest.cpu())
        self.highest = torch.maximum(self.highest, highest.cpu())
        self.counts += counts.cpu()

    def add_values(self, values: Tensor) -> None:
        """Add all of these."""
        if values.numel():
            self.add(*values.float().aminmax(), float_counts(values))


class Ranges(FeatureMeasure):
    """Exact minimum and maximum, 0.01 % and 99.99 % quantiles of what enters softmax, activation and norms.

    Softmax takes the scores of visible keys with scale, bias and soft-capping, of all heads of a layer (`logits` shares
    them); the activation the first feed-forward map's output. A norm is named for the linear maps that read its output,
    attention's or the feed-forward part's, and has their layer; the final norm, in a model with one stack of blocks, is
    the only one outside of them that none of their maps reads. Norms of branch outputs, queries and keys are left out,
    and layers without a site are NaN there. Quantiles come from histograms and are within 2^-8 (0.4 %). Padding counts
    nowhere.

    Raises UnsupportedModel (a ValueError) for a model that does not route its attention through transformers' registry,
    ValueError for one whose feed-forward parts are not found.
    """

    gives = tuple(f"{site}_{value}" for site in SITES for value in ("min", "max", *QUANTILES))

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._tap = AttentionTap(model, self._read_scores)
        self._scores: dict[HeadLayer, Range] = {}
        self._sites: dict[str, dict[Label, Range]] = {site: {} for site in LAYER_SITES[1:]}
        self._norms = [module for name, module in model.named_modules() if is_norm(name, module)]
        inside = {module for place in self.places for module in place.block.modules()}
        one_stack = all(isinstance(place.label, int) for place in self.places)
        # Candidates for the final norm: a norm that a map of a block reads leaves them.
        self._outside = {norm: Range() for norm in self._norms if one_stack and norm not in inside}
        # The newest outputs of norms: the norm, its output, its input, and the sites that were counted.
        self._outputs: deque[tuple[nn.Module, Tensor, Tensor, set[str]]] = deque(maxlen=4)

    def attach(self) -> ExitStack:
        hooks = super().attach()
        hooks.enter_context(self._tap)
        hooks.callback(self._outputs.clear)
        for norm in self._norms:
            hooks.callback(norm.register_forward_hook(self._read_norm).remove)
        for place in self.places:
            for module, site in _readers(place).items():
                hook = partial(self._read_consumer, site, place.label)
                hooks.callback(module.register_forward_pre_hook(hook).remove)
        return hooks

    def _read_scores(self, layer: HeadLayer, call: AttentionCall) -> None:
        scores = call.once(scores_of)
        self._scores.setdefault(layer, Range()).add(scores.lowest_H.amin(), scores.highest_H.amax(), scores.counts)

    def read_before(self, layer: int, features_NF: Tensor) -> None:
        self._sites["activation_input"].setdefault(self.places[layer].label, Range()).add_values(features_NF)

    def _read_norm(self, norm: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not (inputs and isinstance(output, Tensor)):
            return
        self._outputs.append((norm, output, inputs[0], set()))
        if norm in self._outside:
            self._outside[norm].add_values(real_tokens(inputs[0], self.mask_BT))

    def _read_consumer(self, site: str, label: Label, _linear: nn.Module, inputs: tuple[Any, ...]) -> None:
        for norm, output, features, counted in self._outputs:
            if inputs and inputs[0].data_ptr() == output.data_ptr() and inputs[0].numel() == output.numel():
                self._outside.pop(norm, None)
                if site not in counted:  # queries, keys and values read one norm
                    counted.add(site)
                    features_NF = real_tokens(features, self.mask_of(label))
                    self._sites[site].setdefault(label, Range()).add_values(features_NF)

    def totals(self) -> dict[str, Total]:
        values: dict[str, Total] = {}
        for site, ranges in self._ranges().items():
            lowest, highest = (torch.stack([getattr(each, name) for each in ranges]) for name in ("lowest", "highest"))
            nothing = lowest > highest
            for name, value in (("min", lowest), ("max", highest)):
                value = value.double().masked_fill(nothing, torch.nan)
                values[f"{site}_{name}"] = value if site in LAYER_SITES else value[0]
        return values

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        values, extremes = {}, self.totals()
        for site, ranges in self._ranges().items():
            counts_LB = over_processes(torch.stack([each.counts for each in ranges]), device)
            lowest, highest = (merged(f"{name}imum", extremes[f"{site}_{name}"], device) for name in ("min", "max"))
            for name, value in zip(QUANTILES, quantiles(counts_LB, [*QUANTILES.values()]), strict=True):
                value = value if site in LAYER_SITES else value[0]
                values[f"{site}_{name}"] = torch.minimum(torch.maximum(value, lowest), highest)
        return values

    def _ranges(self) -> dict[str, list[Range]]:
        """The ranges of every site that the model has, a layer each; that of the final norm is alone."""
        in_order = [self._scores[layer] for layer in sorted(self._scores)]
        scores = dict(zip(labels(self._scores), in_order, strict=True))
        sites = {"softmax_input": scores} | self._sites
        order = self.layers
        layers = {site: [ranges.get(label, Range()) for label in order] for site, ranges in sites.items() if ranges}
        final = [each for each in self._outside.values() if each.counts.any()]
        return layers | ({"final_norm_input": final} if len(final) == 1 else {})

    @property
    def layers(self) -> list[Label]:
        places = super().layers
        return [*places, *(label for label in labels(self._scores) if label not in places)]


def _readers(place: Place) -> dict[nn.Module, str]:
    """The linear maps of a block, and the site of a norm that one of them reads."""
    names = {module: name for name, module in place.block.named_modules()}
    part = names[place.reads].rpartition(".")[0]  # empty where the maps are the block's own
    readers = {}
    for module, name in names.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            of_feed_forward = module is place.reads or (part and name.startswith(f"{part}."))
            readers[module] = "feed_forward_norm_input" if of_feed_forward else "attention_norm_input"
    return readers


def is_norm(name: str, module: nn.Module) -> bool:
    """True for a module without parts that is called a norm by its own name or its class, but for an Identity."""
    called = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    is_single = next(module.children(), None) is None and not isinstance(module, nn.Identity)
    return is_single and ("norm" in called or called.startswith("ln"))
