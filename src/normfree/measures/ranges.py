"""What enters every nonlinearity: extremes and extreme quantiles, by layer."""

# L layers, B bins, N tokens, F features

from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor, nn

from normfree.entropy.layers import HeadLayer, labels
from normfree.entropy.routing import AttentionCall
from normfree.entropy.tap import AttentionTap
from normfree.measures.histogram import float_counts, quantiles
from normfree.measures.measure import stacked
from normfree.measures.places import Label, Place
from normfree.measures.reading import FeatureMeasure, real_tokens
from normfree.measures.scores import scores_of

SITES = ("softmax_input", "activation_input", "attention_norm_input", "feed_forward_norm_input", "final_norm_input")
QUANTILES = {"low": 1e-4, "high": 1 - 1e-4}


class Ranges(FeatureMeasure):
    """Exact minimum and maximum, 0.01 % and 99.99 % quantiles of what enters softmax, activation and norms.

    Softmax takes the scores of visible keys with scale, bias and soft-capping, of all heads of a layer (`logits` shares
    them); the activation the first feed-forward map's output. A norm is named for the linear maps that read its output,
    attention's or the feed-forward part's, and has their layer; the final norm, in a model with one stack of blocks, is
    the only one outside of them that none of their maps reads. Norms of branch outputs, queries and keys are left out,
    and layers without a site are NaN there. Quantiles come from histograms and are within 2^-8 (0.4 %). Raises
    UnsupportedModel (a ValueError) for a model that does not route its attention.
    """

    gives = tuple(f"{site}_{value}" for site in SITES for value in ("min", "max", *QUANTILES))

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._tap = AttentionTap(model, self._read_scores)
        norms = {module: name for name, module in model.named_modules() if is_norm(name, module)}
        self._norms, self._of_encoder = [*norms], {norm for norm, name in norms.items() if "encoder" in name.split(".")}
        inside = {module for place in self.places for module in place.block.modules()}
        one_stack = all(isinstance(place.label, int) for place in self.places)
        outside = {*getattr(model, "base_model", model).modules()} - inside if one_stack else ()
        # Candidates for the final norm: not of a head, and a norm that a map of a block reads leaves them.
        self._outside = [norm for norm in self._norms if norm in outside]
        self._beside = {norm: maps for place in self.places for norm, maps in _norms_of_maps(place.block).items()}
        # The newest outputs of norms: the norm, its output, its input, and the sites that were counted.
        self._outputs: deque[tuple[nn.Module, Tensor, Tensor, set[str]]] = deque(maxlen=4)

    def attach(self) -> Iterator[AbstractContextManager[Any]]:
        yield from super().attach()
        yield self._tap
        for norm in self._norms:
            yield norm.register_forward_hook(self._read_norm)
        for place in self.places:
            for module, site in _readers(place).items():
                yield module.register_forward_pre_hook(partial(self._read_consumer, site, place.label))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._outputs.clear()

    def _read_scores(self, layer: HeadLayer, call: AttentionCall) -> None:
        scores = call.once(scores_of)
        self._add(layer, "softmax_input", scores.lowest_H.amin(), scores.highest_H.amax(), scores.counts)

    def read_before(self, layer: int, features_NF: Tensor) -> None:
        self._add_values(self.places[layer].label, "activation_input", features_NF)

    def _read_norm(self, norm: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not (inputs and isinstance(output, Tensor)):
            return
        self._outputs.append((norm, output, inputs[0], set()))
        if norm in self._outside:
            mask_BT = self.mask_of(0)
            if mask_BT is not None and mask_BT.numel() != inputs[0].shape[:-1].numel():
                self._outside.remove(norm)  # in a head that reads some tokens only
            else:
                self._add_values(norm, "final_norm_input", real_tokens(inputs[0], mask_BT))

    def _read_consumer(self, site: str, label: Label, linear: nn.Module, inputs: tuple[Any, ...]) -> None:
        for norm, output, features, counted in self._outputs:
            if linear in self._beside.get(norm, ()):
                continue
            if inputs and inputs[0].data_ptr() == output.data_ptr() and inputs[0].numel() == output.numel():
                if norm in self._outside:
                    self._outside.remove(norm)
                if site not in counted:  # queries, keys and values read one norm
                    counted.add(site)
                    crosses = norm in self._of_encoder and str(label).startswith("decoder")
                    mask_BT = self.mask_of("encoder" if crosses else label)
                    self._add_values(label, site, real_tokens(features, mask_BT))

    def _add_values(self, key: Hashable, site: str, values: Tensor) -> None:
        if values.numel():
            self._add(key, site, *values.float().aminmax(), float_counts(values))

    def _add(self, key: Hashable, site: str, lowest: Tensor, highest: Tensor, counts: Tensor) -> None:
        """Add values by their extremes, NaN if one of them is, and their `float_counts`."""
        self.raise_to((site, key), below=-lowest, highest=highest)
        self.add((site, key), counts=counts)

    def values(self, below: Tensor, highest: Tensor, counts: Tensor) -> dict[str, Tensor]:
        low, high = quantiles(counts, [*QUANTILES.values()]).clamp(-below, highest)
        values = {"min": -below, "max": highest, "low": low, "high": high}
        return {name: value.masked_fill(counts.sum() == 0, torch.nan) for name, value in values.items()}

    def pooled(self, device: torch.device | str | None) -> dict[str, Tensor]:
        heads = dict(zip(labels(self._heads), sorted(self._heads), strict=True))
        keys: dict[str, list[Any]] = dict.fromkeys(SITES, self.layers)
        keys["softmax_input"] = [heads.get(label) for label in self.layers]
        final = [norm for norm in self._outside if ("final_norm_input", norm) in self.sums]
        keys["final_norm_input"] = final if len(final) == 1 else []
        values = {}
        for site, of_layers in keys.items():
            for name, value in stacked([self.layer_values((site, key), device) for key in of_layers]).items():
                values[f"{site}_{name}"] = value[0] if site == "final_norm_input" else value
        return values

    @property
    def _heads(self) -> list[HeadLayer]:
        return [layer for site, layer in self.sums if site == "softmax_input"]

    @property
    def layers(self) -> list[Label]:
        return list(dict.fromkeys([*super().layers, *labels(self._heads)]))


def _readers(place: Place) -> dict[nn.Module, str]:
    """The linear maps of a block, and the site of a norm that one of them reads."""
    names = {module: name for name, module in place.block.named_modules()}
    part = names[place.reads].rpartition(".")[0]  # empty where the maps are the block's own
    readers = {}
    for module, name in names.items():
        if _is_map(module):
            of_feed_forward = module is place.reads or (part and name.startswith(f"{part}."))
            readers[module] = "feed_forward_norm_input" if of_feed_forward else "attention_norm_input"
    return readers


def _norms_of_maps(block: nn.Module) -> dict[nn.Module, set[nn.Module]]:
    """Norms inside a part that come after one of its linear maps, as those of low-rank queries, and the part's maps."""
    maps_beside: dict[nn.Module, set[nn.Module]] = {}
    for part in [*block.modules()][1:]:
        maps = {child for child in part.children() if _is_map(child)}
        behind = dropwhile(lambda child: not _is_map(child[1]), part.named_children())
        maps_beside |= dict.fromkeys((child for name, child in behind if is_norm(name, child)), maps)
    return maps_beside


def _is_map(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def is_norm(name: str, module: nn.Module) -> bool:
    """True for a module without parts that is called a norm by its own name or its class, but for an Identity."""
    called = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    is_single = next(module.children(), None) is None and not isinstance(module, nn.Identity)
    return is_single and ("norm" in called or called.startswith("ln"))
