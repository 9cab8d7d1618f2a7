"""Optimisers: a table from names of `train.optimizer` to builders of a torch optimiser from groups of parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from normfree.model.blocks import Block
from normfree.model.modeling import NormFreePreTrainedModel
from normfree.spec.run import TrainSpec
from normfree.training.objectives import Objective


def parameter_groups(
    model: NormFreePreTrainedModel, train: TrainSpec, objective: Objective | None = None
) -> list[dict[str, Any]]:
    """Group parameters by weight decay: on matrices and embeddings, never on biases and norms, optional on slopes."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    slope_names = model.negative_slopes()
    slopes = [p for name, p in named if name in slope_names]
    others = [p for name, p in named if name not in slope_names]
    slope_decay = train.weight_decay if train.decay_slopes is True else float(train.decay_slopes)
    slope_rate = train.peak_learning_rate * train.slope_learning_rate_factor
    learned_by_objective = list(objective.parameters()) if objective else []
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in others if p.ndim < 2] + learned_by_objective, "weight_decay": 0.0},
        {"params": slopes, "weight_decay": slope_decay, "lr": slope_rate},
    ]
    return [group for group in groups if group["params"]]


class MuonWithAdamW(Optimizer):
    """Muon for the matrices of the blocks, AdamW for all other parameters (arXiv 2502.16982).

    A projection of several matrices, such as queries, keys and values, has each of them orthogonalised by itself.
    `adjust_lr_fn="match_rms_adamw"` lets one learning rate serve both. Momentum is 0.95, with Nesterov.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], train: TrainSpec) -> None:
        super().__init__(groups, {"lr": train.peak_learning_rate})
        linears = [module for block in model.modules() if isinstance(block, Block) for module in block.modules()]
        self._matrices: dict[Tensor, tuple[list[int], list[Tensor]]] = {}
        for module in linears:
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                rows = getattr(module, "row_counts", [module.out_features])
                self._matrices[module.weight] = rows, list(module.weight.detach().split(rows))
        parts = [part for _, parts in self._matrices.values() for part in parts]
        rate, decay = train.peak_learning_rate, train.weight_decay
        self._muon = Muon(parts, rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        others = [
            {**group, "params": [p for p in group["params"] if p not in self._matrices]} for group in self.param_groups
        ]
        self._adamw = _adamw([group for group in others if group["params"]], train)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step. The learning rates are those of `param_groups`, which a schedule changes."""
        assert closure is None
        rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        for weight, (rows, parts) in self._matrices.items():
            gradients = (None,) * len(parts) if weight.grad is None else weight.grad.split(rows)
            for part, values, gradient in zip(parts, weight.detach().split(rows), gradients, strict=True):
                part.data, part.grad = values, gradient  # anew: DistributedDataParallel may have moved the weight
        self._muon.param_groups[0]["lr"] = rates[id(next(iter(self._matrices)))]
        for group in self._adamw.param_groups:
            group["lr"] = rates[id(group["params"][0])]
        self._muon.step()
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimisers, and the groups' learning rates."""
        return {
            "muon": self._muon.state_dict(),
            "adamw": self._adamw.state_dict(),
            "rates": [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in self.param_groups],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])
        for group, rates in zip(self.param_groups, state_dict["rates"], strict=True):
            group.update(rates)


def _adamw(groups: list[dict[str, Any]], train: TrainSpec, *, fused: bool | None = None) -> AdamW:
    betas = train.adam_beta1, train.adam_beta2
    return AdamW(groups, train.peak_learning_rate, betas=betas, eps=train.adam_epsilon, fused=fused)


OPTIMIZERS: dict[str, Callable[[nn.Module, list[dict[str, Any]], TrainSpec], Optimizer]] = {
    "adamw": lambda _model, groups, train: _adamw(groups, train, fused=True),
    "muon": MuonWithAdamW,
}
