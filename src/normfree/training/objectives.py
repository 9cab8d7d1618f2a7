"""What a run minimises: the loss of the next token, alone or with a term that moves the entropies of heads.

A term is linear in the entropies E of the batch: its factor comes from M, the same heads' mean entropies in the
previous optimiser step, over all processes. So it is exact however a step is cut into micro-batches and processes.
"""

# L layers that the objective reads, H heads

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normfree.model import NormFreeConfig
from normfree.spec.families import CLASSIFICATIONS, FAMILIES
from normfree.spec.run import RunSpec
from normfree.store.runs import Run, find_runs

BAND = 0.2
"""entropy_band: half of the dead zone's width, as a share of the ceiling (arXiv 2501.03489)."""
BAND_START = 0.5
"""entropy_band: where each head's learnable centre starts, as a share of the ceiling."""


class Objective(nn.Module):
    """The loss of the next token, and for the heads of `layers` a term of their entropies; without layers that alone.

    The term is weight * mean over heads of 2 (M - t) E, whose gradient is that of (M - t)^2; 0 in the first step.
    """

    def __init__(self, config: NormFreeConfig, weight: float = 0.0, layers: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight, self.layers, self.layer_count = weight, layers, config.num_hidden_layers
        self.step = 0
        shape = len(layers), config.num_attention_heads
        self.previous_LH = nn.Buffer(torch.full(shape, torch.nan))
        self.sum_LH = nn.Buffer(torch.zeros(shape))

    def deviations(self) -> Tensor:
        """(L, H): M minus its target, without gradient."""
        raise NotImplementedError

    def penalised(self, entropies_LH: Tensor) -> Tensor:
        """(L, H): what the term is linear in."""
        return entropies_LH

    def term(self, entropies_LH: Tensor, share: float) -> Tensor:
        """What a micro-batch adds to the loss; `share` is its share of the step's sequences."""
        self.sum_LH += entropies_LH.detach() * share
        if not self.step:
            return entropies_LH.new_zeros(())
        return self.weight * share * (2 * self.deviations() * self.penalised(entropies_LH)).mean()

    def advance(self, step: int, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Move to the state after optimiser step `step`."""
        self.previous_LH.copy_(sum_over_processes(self.sum_LH))
        self.discard_step()
        self.step = step

    def discard_step(self) -> None:
        """Discard a step's measurements and gradients."""
        self.sum_LH.zero_()
        self.zero_grad()  # Trainer knows the model's parameters only

    def values(self) -> dict[str, list[float]]:
        """What to record: quantities by layer, NaN for layers that the objective does not read."""
        if not self.step:
            return {}
        errors_LH = self.previous_LH.new_full((self.layer_count, self.previous_LH.shape[1]), math.nan)
        errors_LH[[*self.layers]] = self.deviations()
        squares_L, distances_L = errors_LH.square().mean(1), errors_LH.abs().amax(1)
        return {"target_error_nats2": squares_L.tolist(), "target_distance_nats": distances_L.tolist()}

    def state(self) -> dict[str, Any]:
        """Plain values that bring the objective back on a resume."""
        if not self.step:  # as it was made
            return {}
        parameters = {name: parameter.tolist() for name, parameter in self.named_parameters()}
        return {"step": self.step, "previous": self.previous_LH.tolist(), "parameters": parameters}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.step = state["step"]
        self.previous_LH.copy_(torch.tensor(state["previous"]))
        for name, values in state["parameters"].items():
            self.get_parameter(name).copy_(torch.tensor(values))


class EntropyTarget(Objective):
    """Heads of a layer, ordered by M, are pulled to ascending targets."""

    def __init__(
        self, config: NormFreeConfig, weight: float, layers: tuple[int, ...], *, targets: Callable[[int], np.ndarray]
    ) -> None:
        super().__init__(config, weight, layers)
        self.targets = targets

    def deviations(self) -> Tensor:
        ascending_LH = torch.as_tensor(self.targets(self.step), dtype=torch.float32, device=self.previous_LH.device)
        ranks_LH = self.previous_LH.argsort(dim=1).argsort(dim=1)
        return self.previous_LH - ascending_LH.gather(1, ranks_LH)


class EntropyBand(Objective):
    """Heads are pulled to theta * ceiling where they lie outside of a band around it; theta is learnable.

    The regulariser of Entropy-Guided Attention (arXiv 2501.03489), with M for the entropies of the batch in the factor.
    """

    def __init__(self, config: NormFreeConfig, weight: float, layers: tuple[int, ...], *, ceiling: float) -> None:
        super().__init__(config, weight, layers)
        self.ceiling = ceiling
        self.theta_LH = nn.Parameter(torch.full_like(self.previous_LH, BAND_START))

    def deviations(self) -> Tensor:
        deviations_LH = self.previous_LH - self.theta_LH.detach() * self.ceiling
        return torch.where(deviations_LH.abs() <= BAND * self.ceiling, 0.0, deviations_LH)  # NaN stays NaN

    def penalised(self, entropies_LH: Tensor) -> Tensor:
        return entropies_LH - self.theta_LH * self.ceiling


def build_objective(spec: RunSpec, config: NormFreeConfig, steps: int) -> Objective:
    """Build the objective of a run with this many steps.

    Raises ValueError for layers that the model lacks, targets out of range, and donors as `read_profile` does.
    """
    train, tokens = spec.train, spec.data.context
    if train.objective in ("next_token", *CLASSIFICATIONS):
        return Objective(config)
    layers = tuple(range(config.num_hidden_layers)) if train.entropy_layers is None else train.entropy_layers
    last = config.num_hidden_layers - 1
    if not layers or list(layers) != sorted(set(layers) & set(range(last + 1))):
        advice = f"give layers of 0 to {last}, each once and in ascending order"
        raise ValueError(f"train.entropy_layers={list(layers)}; {advice}")
    if config.attention_sink != "none":
        both = f"train.objective={train.objective} with model.attention_sink={config.attention_sink}"
        raise ValueError(f"{both}: entropies of rows that do not sum to 1 have no target; leave one of them out")
    weight, ceiling = train.entropy_weight, FAMILIES[config.family].ceiling(tokens)
    assert weight is not None, "RunSpec asks for it"
    if train.objective == "entropy_band":
        return EntropyBand(config, weight, layers, ceiling=ceiling)
    if train.entropy_profile:
        profile_steps, profile_PLH = read_profile(train.entropy_profile, spec, config, steps)
        sources = train.entropy_profile_layers or layers
        if len(sources) != len(layers) or not set(sources) <= set(range(last + 1)):
            advice = f"give {len(layers)} layers of 0 to {last}, one for each of train.entropy_layers"
            raise ValueError(f"train.entropy_profile_layers={list(sources)}; {advice}")
        profile_PLH = profile_PLH[:, sources]

        def targets(step: int) -> np.ndarray:
            later = int(np.clip(np.searchsorted(profile_steps, step), 1, len(profile_steps) - 1))
            before, after = profile_steps[later - 1], profile_steps[later]
            position = (step - before) / (after - before)
            return (1 - position) * profile_PLH[later - 1] + position * profile_PLH[later]

        return EntropyTarget(config, weight, layers, targets=targets)
    nats = train.entropy_nats or [ceiling * (train.entropy_share or 0.0)] * len(layers)
    if len(nats) != len(layers) or not all(0 <= value <= ceiling for value in nats):
        of_layers = f"a number for each of the {len(layers)} layers of train.entropy_layers"
        highest = f"from 0 to the ceiling of {ceiling:.3f} nats at data.context={tokens}"
        raise ValueError(f"train.entropy_nats={list(nats)}; give {of_layers}, {highest}")
    constant_LH = np.repeat(np.array(nats, dtype=float)[:, None], config.num_attention_heads, axis=1)
    return EntropyTarget(config, weight, layers, targets=lambda step: constant_LH)


def read_profile(
    places: tuple[str, ...], spec: RunSpec, config: NormFreeConfig, steps: int
) -> tuple[list[int], np.ndarray]:
    """The probed steps P, and the donors' entropies (P, all layers, H): sorted within each layer, then averaged.

    Raises ValueError for donors that are missing, damaged, without probes, or of another shape.
    """
    probed_at, profiles = [], []
    for donor in find_donors(places):
        series = donor.series("probe", "entropy_nats")
        if len(series) < 2:
            raise ValueError(f"train.entropy_profile: {donor} has no probes of entropy over training")
        entropies_PLH = np.sort(np.array([value for _, value in series], dtype=float), axis=2)
        both = {
            "model.num_hidden_layers": (entropies_PLH.shape[1], config.num_hidden_layers),
            "model.num_attention_heads": (entropies_PLH.shape[2], config.num_attention_heads),
            "data.context": (donor.spec["data"]["context"], spec.data.context),
            "train.steps": (donor.steps_done, steps),
        }
        if differing := [f"{key} is {then} there and {now} here" for key, (then, now) in both.items() if then != now]:
            raise ValueError(f"train.entropy_profile: {donor} has another shape: {', '.join(differing)}")
        probed_at.append([step for step, _ in series])
        profiles.append(entropies_PLH)
    if any(probed != probed_at[0] for probed in probed_at):
        raise ValueError("train.entropy_profile: the donors were probed at different steps (probe.every_steps)")
    return probed_at[0], np.mean(profiles, axis=0)


def find_donors(places: tuple[str, ...]) -> list[Run]:
    """The runs in these folders. Raises ValueError if one is missing, damaged or not finished."""
    try:
        donors = find_runs(places)
    except ValueError as error:
        raise ValueError(f"train.entropy_profile: {error}") from None
    if unfinished := [donor.place for donor in donors if donor.status != "finished"]:
        raise ValueError(f"train.entropy_profile: not finished: {', '.join(unfinished)}")
    return donors
