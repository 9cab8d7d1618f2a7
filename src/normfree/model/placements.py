"""Where the norms of a block sit: a table from names of `NormFreeConfig.placement` to places.

x is the residual stream, F attention or feed-forward: `input` is x + F(N(x)), `output` is x + N(F(x)), `stream` is
N(x + F(x)). Each place that an entry names gets a norm of its own.
"""

from collections.abc import Callable

from .configuration import NormFreeConfig


def _mixed(config: NormFreeConfig, layer: int) -> set[str]:
    layers = config.num_hidden_layers
    post = min(max(int(config.post_share * layers + 0.5), 1), layers - 1)  # at least one of either
    return {"stream"} if layer < post else {"input"}


PLACEMENTS: dict[str, Callable[[NormFreeConfig, int], set[str]]] = {
    "pre": lambda config, layer: {"input"},
    "post": lambda config, layer: {"stream"},
    "peri": lambda config, layer: {"input", "output"},
    "mix": _mixed,
}
