"""One block of a trained run, taken out of PyTorch for the simulator of private inference.

Shape legend: T tokens, E hidden size, D head dim, R rotating dims of a head
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfree.cost.block import BlockInputs, BlockMeasured, simulate_block
from normfree.cost.constants import CONSTANTS_FILE
from normfree.cost.environment import check_simulated, find_python
from normfree.cost.totals import of_run
from normfree.measure import token_windows
from normfree.pretrained import load_pretrained
from normfree.records import read_run


def measure_block(
    run: Path | str,
    text: Callable[[], str],
    *,
    python: Path | None = None,
    protocol: str = "semi2k",
    layer: int = 0,
    tokens: int = 32,
    constants: Path = CONSTANTS_FILE,
) -> BlockMeasured:
    """Run one block of a finished run, on the first `tokens` tokens of a text, in the SPU simulator and in PyTorch.
    `text` is called only once all else is known to be right.

    Raises ValueError for a folder that is no finished run, a protocol, layer or number of tokens that there is not,
    a text that is too short, and a Python without SPU; RuntimeError when the simulator fails.
    """
    facts = read_run(run)
    cost = of_run(facts, protocol=protocol, constants=constants)
    check_simulated(protocol)
    if not 2 <= tokens <= cost.context:
        raise ValueError(f"tokens={tokens} must be 2 to {cost.context}, the longest sequence of {run}")
    cost = of_run(facts, context=tokens, protocol=protocol, constants=constants)
    layers = cost.architecture.layers
    if not 0 <= layer < layers:
        raise ValueError(f"layer={layer} must be 0 to {layers - 1}: {run} has {layers} layers")
    python = find_python(python)
    model, tokenizer = load_pretrained(str(run), device="cpu")
    ids_NT = token_windows(model, tokenizer, text(), context=tokens, sequences=1)
    if ids_NT.shape[1] < tokens:
        raise ValueError(f"the text has {ids_NT.shape[1]} tokens, fewer than tokens={tokens}")
    return simulate_block(python, block_inputs(model, ids_NT, layer=layer), cost, layer=layer)


def block_inputs(model: Any, ids_1T: Tensor, *, layer: int) -> BlockInputs:
    """Weights, settings, input and output of one block of a NormFreeForCausalLM on one sequence."""
    block, config, seen = model.model.layers[layer], model.config, {}

    def keep(module: Any, positional: tuple[Tensor, ...], named: dict[str, Any], output_1TE: Tensor) -> None:
        seen.update(hidden=positional[0][0], output=output_1TE[0], rotation=named["rotation"])

    handle = block.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(ids_1T)
    finally:
        handle.remove()
    arrays = {"hidden": seen["hidden"], **_weights(block, config), **_slope(model, block)}
    if seen["rotation"] is not None:
        arrays |= {name: angle[0, 0] for name, angle in zip(("cosines", "sines"), seen["rotation"], strict=True)}
    settings = {
        "norm": config.norm,
        "norm_epsilon": config.norm_epsilon,
        "activation": config.layer_activations[layer],
        "negative_slope": config.negative_slope,
        "heads": config.num_attention_heads,
        "residual": config.residual,
    }
    shown = {name: _numpy(tensor) for name, tensor in arrays.items()}
    return BlockInputs(arrays=shown, settings=settings, output_TE=_numpy(seen["output"]))


def _weights(block: Any, config: Any) -> dict[str, Tensor]:
    weights = {name: tensor.float() for name, tensor in block.state_dict().items() if not name.endswith("slope")}
    width = config.hidden_size
    for name in ("attention.qkv.weight", "attention.qkv.bias"):
        if name in weights:
            queries, others = weights[name].split([width, len(weights[name]) - width])
            weights[name] = torch.cat([queries * block.attention.scaling, others])
    if len(weights.get("attention.qkv.bias", ())) == 2 * width:  # values have none
        weights["attention.qkv.bias"] = torch.cat([weights["attention.qkv.bias"], torch.zeros(width)])
    return weights


def _slope(model: Any, block: Any) -> dict[str, Tensor]:
    """The learnable slope of this block's leaky ReLU, where there is one."""
    own = getattr(block.feed_forward.activation, "negative_slope", None)
    leaky = model.config.layer_activations[block.attention.layer_idx] == "leaky_relu"
    slope = own if own is not None else model.model.shared_negative_slope
    return {"slope": slope} if leaky and slope is not None else {}


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()
