"""Normalizations: a table from names of `NormFreeConfig.norm` and `.final_norm` to builders.

A builder takes the config and a `NormSite`, and returns a module that maps (..., width) to (..., width). A module may
declare `initial_values`, which the model fills in; `sums` and `advance`, if its state changes while training.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .configuration import NormFreeConfig


@dataclass(frozen=True)
class NormSite:
    """Where a norm sits: in which part of the model, in which block (from 0), and over how many features."""

    part: Literal["attention", "feed_forward", "final", "query_key"]
    layer: int
    width: int


class ScaledLayerNorm(nn.LayerNorm):
    """LayerNorm times 1 / sqrt(layer + 1) in a block, layers counted from 0 (LayerNorm scaling, arXiv 2502.05795)."""

    def __init__(self, site: NormSite, eps: float) -> None:
        super().__init__(site.width, eps=eps)
        self.factor = 1.0 if site.part == "final" else (site.layer + 1) ** -0.5

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor


class SquashingNorm(nn.Module):
    """gain * f(steepness * x) + offset, with one learnable steepness: no statistics of the input."""

    def __init__(self, width: int, steepness: float) -> None:
        super().__init__()
        self.initial_values = {"gain": 1.0, "offset": 0.0, "steepness": steepness}
        self.gain, self.offset = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.steepness = nn.Parameter(torch.empty(1))


class DynamicTanh(SquashingNorm):
    """DyT: gain * tanh(steepness * x) + offset (arXiv 2503.10622)."""

    def forward(self, features: Tensor) -> Tensor:
        return self.gain * torch.tanh(self.steepness * features) + self.offset


class DynamicErf(SquashingNorm):
    """Derf: gain * erf(steepness * x + shift) + offset, the shift one scalar (arXiv 2512.10938)."""

    def __init__(self, width: int, steepness: float) -> None:
        super().__init__(width, steepness)
        self.initial_values["shift"] = 0.0
        self.shift = nn.Parameter(torch.empty(1))

    def forward(self, features: Tensor) -> Tensor:
        return self.gain * torch.erf(self.steepness * features + self.shift) + self.offset


class BoundedTanh(nn.Module):
    """BHyT: gain * tanh(bound / 10 * x / rms(x)), the bound learnable. It still takes one mean square a token."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.initial_values = {"gain": 1.0, "bound": 2.0}
        self.eps = eps
        self.gain = nn.Parameter(torch.empty(width))
        self.bound = nn.Parameter(torch.empty(1))

    def forward(self, features: Tensor) -> Tensor:
        scale = self.bound / 10 * _inverse_rms(features, self.eps)
        return self.gain * torch.tanh(scale.to(features.dtype) * features)


class TaperedNorm(nn.Module):
    """gain * (share / rms(x) + (1 - share) * mean_inverse_rms) * x (arXiv 2602.10408).

    Optimiser steps up to `start` have share 1. It falls to 0 along a cosine; from step `end` on the norm is a fixed
    scale that a matrix can absorb. `mean_inverse_rms` averages 1/rms over the tokens of a step, 0.9 old and 0.1 new,
    while the share is above 0. `advance` changes both; `forward` never does.
    """

    def __init__(self, width: int, eps: float, start: int, end: int) -> None:
        super().__init__()
        self.initial_values = {"gain": 1.0, "share": 1.0, "mean_inverse_rms": 0.0}
        self.eps, self.start, self.end = eps, start, end
        self.gain = nn.Parameter(torch.empty(width))
        self.share, self.mean_inverse_rms = (nn.Buffer(torch.empty(())) for _ in range(2))

    def forward(self, features: Tensor) -> Tensor:
        scale = self.share * _inverse_rms(features, self.eps) + (1 - self.share) * self.mean_inverse_rms
        return self.gain * scale.to(features.dtype) * features

    def sums(self, features: Tensor) -> Tensor:
        """(2,): the sum of 1/rms over tokens, and their number."""
        inverse_rms = _inverse_rms(features.detach(), self.eps)
        return torch.stack([inverse_rms.sum(), inverse_rms.new_tensor(inverse_rms.numel())])

    @torch.no_grad()
    def advance(self, step: int, sums: Tensor) -> None:
        """Move to the state that the optimiser step after `step` has, from the `sums` over the tokens of `step`."""
        mean = sums[0] / sums[1]
        average = torch.where(self.mean_inverse_rms == 0, mean, 0.9 * self.mean_inverse_rms + 0.1 * mean)
        self.mean_inverse_rms.copy_(torch.where(self.share > 0, average, self.mean_inverse_rms))
        progress = min(max((step + 1 - self.start) / (self.end - self.start), 0.0), 1.0)
        self.share.fill_(0.5 * (1 + math.cos(math.pi * progress)) if progress < 1 else 0.0)


class FakeLayerNorm(nn.LayerNorm):
    """(x - mean(x)) / sigma * weight + bias: LayerNorm until it is removed, a fixed sigma from then on (FakeLN).

    Before optimiser step `removal` sigma is each token's standard deviation, and two averages of it, 0.9 old and 0.1
    new, move: of the first position, whose tokens differ from all others, and of the rest. From `removal` on they stand
    in for sigma; from `merge` on that of the rest also does at the first position, so that a matrix can absorb the
    norm. Inputs are (..., T, width) from position 0 on. `advance` changes the state; `forward` never does.
    """

    def __init__(self, width: int, eps: float, removal: int, merge: int) -> None:
        super().__init__(width, eps=eps)
        self.initial_values = {"is_fixed": 0.0, "sigma_first": 0.0, "sigma_rest": 0.0}
        self.removal, self.merge = removal, merge
        self.is_fixed, self.sigma_first, self.sigma_rest = (nn.Buffer(torch.empty(())) for _ in range(3))

    def forward(self, input: Tensor) -> Tensor:
        centred, sigma = self._centred_and_sigma(input)
        at_start = torch.arange(input.shape[-2], device=input.device)[:, None] == 0
        fixed = torch.where(at_start, self.sigma_first, self.sigma_rest)
        return (centred / torch.where(self.is_fixed > 0, fixed, sigma) * self.weight + self.bias).to(input.dtype)

    def sums(self, features: Tensor) -> Tensor:
        """(4,): sigma's sum over tokens and their number, for the first position and for the rest."""
        _, sigma = self._centred_and_sigma(features.detach())
        parts = sigma[..., :1, :], sigma[..., 1:, :]
        return torch.stack([value for part in parts for value in (part.sum(), part.new_tensor(part.numel()))])

    @torch.no_grad()
    def advance(self, step: int, sums: Tensor) -> None:
        """Move to the state that the optimiser step after `step` has, from the `sums` over the tokens of `step`."""
        for average, total, count in ((self.sigma_first, *sums[:2]), (self.sigma_rest, *sums[2:])):
            mean = torch.where(count > 0, total / count, average)
            moved = torch.where(average == 0, mean, 0.9 * average + 0.1 * mean)
            average.copy_(torch.where(self.is_fixed > 0, average, moved))
        if step + 1 >= self.removal:
            self.is_fixed.fill_(1.0)
        if step + 1 >= self.merge:
            self.sigma_first.copy_(self.sigma_rest)

    def _centred_and_sigma(self, features: Tensor) -> tuple[Tensor, Tensor]:
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        return centred, torch.sqrt(centred.square().mean(-1, keepdim=True) + self.eps)


def _fake_layer_norm(config: NormFreeConfig, site: NormSite) -> nn.Module:
    """Feed-forward norms are removed first, then attention norms, then the final norm, whose layer is their number."""
    earlier = site.layer + config.num_hidden_layers * (site.part != "feed_forward")
    removal = config.fake_start_step + config.fake_gap_steps * earlier
    return FakeLayerNorm(site.width, config.norm_epsilon, removal, last_removal(config) + MERGE_DELAY)


MERGE_DELAY = 10
"""norm=fake: steps from the last removal to the one sigma for all positions."""


def last_removal(config: NormFreeConfig) -> int:
    """norm=fake: the optimiser step from which the last norm is fixed."""
    norms = 2 * config.num_hidden_layers + (config.final_norm == "fake")
    return config.fake_start_step + config.fake_gap_steps * (norms - 1)


def check_removal(config: NormFreeConfig, steps: int) -> None:
    """Raises ValueError if norms that leave a model would not be fixed in a run of so many steps."""
    last = last_removal(config) + MERGE_DELAY
    if config.norm == "fake" and last >= steps:
        names = f"model.fake_start_step={config.fake_start_step} and model.fake_gap_steps={config.fake_gap_steps}"
        raise ValueError(f"{names} end at step {last}; this run has {steps} steps")
    if config.norm == "taper" and config.taper_end_step > steps:
        raise ValueError(f"model.taper_end_step={config.taper_end_step} is beyond the run's {steps} steps")


def _inverse_rms(features: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean square + eps) of the last dimension, (..., 1), in float32 at least."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _steepness(config: NormFreeConfig, site: NormSite) -> float:
    values = config.norm_steepness
    if not isinstance(values, list):
        return values
    return cast(list[float], values)[("attention", "feed_forward", "final").index(site.part)]


NORMS: dict[str, Callable[[NormFreeConfig, NormSite], nn.Module]] = {
    "layernorm": lambda config, site: nn.LayerNorm(site.width, eps=config.norm_epsilon),
    "rmsnorm": lambda config, site: nn.RMSNorm(site.width, eps=config.norm_epsilon),
    "lns": lambda config, site: ScaledLayerNorm(site, config.norm_epsilon),
    "dyt": lambda config, site: DynamicTanh(site.width, _steepness(config, site)),
    "derf": lambda config, site: DynamicErf(site.width, _steepness(config, site)),
    "bhyt": lambda config, site: BoundedTanh(site.width, config.norm_epsilon),
    "taper": lambda config, site: TaperedNorm(
        site.width, config.norm_epsilon, config.taper_start_step, config.taper_end_step
    ),
    "fake": _fake_layer_norm,
    "none": lambda config, site: nn.Identity(),  # measured: 8 calls cost under 0.01 % of a 4 x 128 step
}
IN_THIS_FILE = dict(NORMS)
"""The entries that are saved with a model: those of this file."""

QUERY_KEY_NORMS = {name: NORMS[name] for name in ("none", "rmsnorm")}
"""Norms of `NormFreeConfig.query_key_norm`, over the dimensions of a head."""
