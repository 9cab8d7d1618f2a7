"""The blocks' linear maps, and how their weights may be reparametrised: a table from names of `NormFreeConfig.linear`.

The modules are ours because torch's parametrizations rename weights. A builder takes rows and columns of one matrix and
returns a module that maps its weight to the weight that is used.
"""

# R rows, C columns

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration import LINEAR_GROUPS, NormFreeConfig


class WeightNorm(nn.Module):
    """gain * weight / norm(weight), row by row; the gain starts at the norm (arXiv 1602.07868)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(rows))

    def forward(self, weight_RC: Tensor) -> Tensor:
        return weight_RC * (self.gain / weight_RC.norm(dim=1))[:, None]

    def start(self, weight_RC: Tensor) -> None:
        """Take the values at which the map leaves `weight_RC` as it is."""
        init.copy_(self.gain, weight_RC.norm(dim=1))


class SpectralNorm(nn.Module):
    """gain * weight / sigma, sigma the largest singular value; the gain starts at sigma (arXiv 2303.06296).

    sigma is left^T weight right. `advance` makes one power iteration for these two vectors after each optimiser step;
    `forward` never changes them.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(1))
        self.left, self.right = nn.Buffer(torch.empty(rows)), nn.Buffer(torch.empty(columns))

    def forward(self, weight_RC: Tensor) -> Tensor:
        sigma = ((weight_RC * self.right).sum(1) * self.left).sum()  # no matmul: autocast would take it to bf16
        return weight_RC * (self.gain / sigma)

    def start(self, weight_RC: Tensor) -> None:
        """Take the values at which the map leaves `weight_RC` as it is, from a singular value decomposition."""
        left_RK, sigmas_K, right_KC = torch.linalg.svd(weight_RC.double(), full_matrices=False)
        for tensor, value in ((self.gain, sigmas_K[:1]), (self.left, left_RK[:, 0]), (self.right, right_KC[0])):
            init.copy_(tensor, value)

    @torch.no_grad()
    def advance(self, weight_RC: Tensor) -> None:
        self.right.copy_(F.normalize(weight_RC.mT @ self.left, dim=0))
        self.left.copy_(F.normalize(weight_RC @ self.right, dim=0))


WeightMap = Callable[[int, int], nn.Module]

LINEARS: dict[str, WeightMap] = {
    "plain": lambda rows, columns: nn.Identity(),
    "weight_norm": WeightNorm,
    "spectral_norm": SpectralNorm,
}


class Projection(nn.Linear):
    """A linear map of one or several matrices (rows, columns), stacked by rows: `builders` make the map of each."""

    def __init__(self, columns: int, rows: int, builders: Mapping[str, WeightMap], *, bias: bool) -> None:
        super().__init__(columns, rows * len(builders), bias=bias)
        self.row_counts = [rows] * len(builders)
        maps = {name: build(rows, columns) for name, build in builders.items()}
        self.maps = nn.ModuleDict(maps) if any(not isinstance(each, nn.Identity) for each in maps.values()) else None

    def used_weight(self) -> Tensor:
        """The weight after its maps, (rows, columns)."""
        if self.maps is None:
            return self.weight
        return torch.cat([map_(part) for map_, part in self._parts()])

    def forward(self, input: Tensor, rows: slice | None = None) -> Tensor:
        """(..., rows): the outputs of all rows, or of these."""
        weight_RC, bias_R = self.used_weight(), self.used_bias()
        if rows is not None:
            weight_RC, bias_R = weight_RC[rows], None if bias_R is None else bias_R[rows]
        return F.linear(input, weight_RC, bias_R)

    def used_bias(self) -> Tensor | None:
        return self.bias

    def start_maps(self) -> None:
        """Let no map change the initial weight."""
        for map_, part in self._parts():
            if not isinstance(map_, nn.Identity):
                map_.start(part.detach())

    def advance(self) -> None:
        """Move the state of the maps to the next optimiser step."""
        for map_, part in self._parts():
            if hasattr(map_, "advance"):
                map_.advance(part)

    def _parts(self) -> list[tuple[Any, Tensor]]:
        if self.maps is None:
            return []
        return list(zip(self.maps.values(), self.weight.split(self.row_counts), strict=True))


class QueryKeyBiasProjection(Projection):
    """Queries, keys and values in one matmul; only queries and keys have a bias."""

    def __init__(self, columns: int, rows: int, builders: Mapping[str, WeightMap], *, bias: bool) -> None:
        super().__init__(columns, rows, builders, bias=False)
        self.bias = nn.Parameter(torch.empty(2 * columns))

    def used_bias(self) -> Tensor:
        return F.pad(self.bias, (0, self.in_features))


class ResidualProjection(Projection):
    """A projection that writes to the residual stream; `residual_init` scales its initial weights."""


def projection(
    config: NormFreeConfig, groups: Sequence[str], columns: int, rows: int, kind: type[Projection] = Projection
) -> Projection:
    """A matrix (rows, columns) for each of `groups`, which are names of LINEAR_GROUPS."""
    chosen = config.linear_groups or LINEAR_GROUPS
    builders = {group: LINEARS[config.linear if group in chosen else "plain"] for group in groups}
    return kind(columns, rows, builders, bias=config.bias == "all")
