"""Run one block of a trained run in SPU's simulator, with its real weights, and print what it sends and how far it is
from PyTorch beside what `normfree cost` predicts.

    python -m benchmarks.private_inference.measure runs/quick/sm-r-seed0 python=spu/bin/python layer=0 context=32

SEMI2K takes seconds, protocol=cheetah one to two minutes. text= is a UTF-8 file whose first tokens are taken (default:
held-out Python code of this machine), constants= the prices to predict with. docs/private-inference.md shows the
numbers to expect.

Shape legend: T tokens, E hidden size, R rotating dims of a head
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.private_inference.simulation import PYTHON, check_python, simulate
from benchmarks.records import read_options
from normfree.cli.options import read_text
from normfree.cost.constants import CONSTANTS_FILE
from normfree.cost.counts import Matmul
from normfree.cost.totals import Cost, config_of_run, of_config
from normfree.measures.text_perplexity import token_windows
from normfree.pretrained.load import load_pretrained
from normfree.report.tables.table import Table, to_markdown
from normfree.store.runs import read_run
from normfree.training.processes import prepare_process

DEFAULTS = {"python": PYTHON, "protocol": "semi2k", "layer": "0", "context": "32", "text": "", "constants": ""}


class Traffic(NamedTuple):
    """Of one block; bytes over both directions."""

    bytes: float
    rounds: int
    """Messages of one party in SEMI2K, whatever the protocol."""
    product_bytes: float
    """Of matrix products, a part of `bytes`."""


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of the simulator for one block."""

    arrays: Mapping[str, np.ndarray]
    """`hidden` (T, E), weights by their names in the block, `slope` where it is learnt, and public `cosines` and
    `sines` (T, R) with rotary positions. The scale of the scores is folded into the query weights."""
    settings: Mapping[str, Any]
    """norm, norm_epsilon, activation, negative_slope, heads, residual."""
    output_TE: np.ndarray
    """The block's output as PyTorch computes it."""


@dataclass(frozen=True)
class Simulated:
    """Measurements of one simulated block."""

    traffic: Traffic
    setup_bytes: float
    """Once per connection, on top of the traffic; 0 in SEMI2K."""
    output_TE: np.ndarray
    settings: str


def main(arguments: list[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise ValueError("name a run folder first, e.g. runs/quick/sm-r-seed0 python=spu/bin/python")
    run, options = arguments[0], read_options(arguments[1:], DEFAULTS)
    protocol, layer, context = options["protocol"], int(options["layer"]), int(options["context"])
    prices = {"protocol": protocol, "constants": options["constants"] or CONSTANTS_FILE}
    cost = of_config(config_of_run(read_run(run)), context=context, **prices)
    if not 0 <= layer < cost.architecture.layers:
        raise ValueError(f"layer={layer} must be 0 to {cost.architecture.layers - 1}")
    check_python(options["python"])
    prepare_process()
    model, tokenizer = load_pretrained(run, device="cpu")
    text = read_text(Path(options["text"]) if options["text"] else None)
    ids_1T = token_windows(model, tokenizer, text, context=context, sequences=1)
    if ids_1T.shape[1] < context:
        raise ValueError(f"the text has {ids_1T.shape[1]} tokens, fewer than context={context}")
    inputs = block_inputs(model, ids_1T, layer=layer)
    simulated = simulate_block(options["python"], inputs, protocol)
    caption = f"Layer {layer} on {context} tokens in the SPU simulator, {protocol}, both directions"
    print(to_markdown(compare(simulated, predict_traffic(cost, layer=layer), caption)))
    error, largest = np.abs(simulated.output_TE - inputs.output_TE).max(), np.abs(inputs.output_TE).max()
    print(f"Largest absolute error against PyTorch: {error:.2g} (outputs up to {largest:.3g})")


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


def simulate_block(python: str, inputs: BlockInputs, protocol: str) -> Simulated:
    """Run one block in the simulator. CHEETAH has a set-up of many megabytes: a program with two blocks less one with
    one block leaves it out. Raises RuntimeError when the simulator fails."""

    def run(protocol: str, copies: int) -> tuple[list[Traffic], np.ndarray, str]:
        with TemporaryDirectory() as folder:
            files = {name: f"{folder}/{name}.npz" for name in ("inputs", "output")}
            np.savez(files["inputs"], allow_pickle=False, **inputs.arrays)
            job = {"protocol": protocol, "operation": "block", "copies": list(range(1, copies + 1)), **files}
            answer = simulate(python, {**job, "settings": dict(inputs.settings)})
            return (
                [Traffic(*each) for each in answer["traffic"]],
                np.load(files["output"])["output"],
                answer["settings"],
            )

    if protocol == "semi2k":
        (once,), output_TE, settings = run(protocol, 1)
        return Simulated(once, 0, output_TE, settings)
    (once, twice), output_TE, settings = run(protocol, 2)
    (counted,), _, _ = run("semi2k", 1)
    block = Traffic(twice.bytes - once.bytes, counted.rounds, twice.product_bytes - once.product_bytes)
    return Simulated(block, once.bytes - block.bytes, output_TE, settings)


def predict_traffic(cost: Cost, *, layer: int) -> Traffic:
    """Predicted communication of one block."""
    items = [item for item in cost.items if item.count.layer == layer]
    products = sum(item.bytes for item in items if isinstance(item.count, Matmul))
    return Traffic(sum(item.bytes for item in items), sum(item.rounds for item in items), products)


def compare(simulated: Simulated, predicted: Traffic, caption: str) -> Table:
    """Measured beside predicted."""
    measured = simulated.traffic
    megabytes = {
        "MB, matrix products": (measured.product_bytes, predicted.product_bytes),
        "MB, everything else": (measured.bytes - measured.product_bytes, predicted.bytes - predicted.product_bytes),
        "MB, the block": (measured.bytes, predicted.bytes),
    }
    rows = [(name, f"{a / 1e6:.2f}", f"{b / 1e6:.2f}", f"{a / b:.3f}") for name, (a, b) in megabytes.items()]
    rounds = (f"{measured.rounds}", f"{predicted.rounds}", f"{measured.rounds / predicted.rounds:.3f}")
    titles = ("", "Measured", "Predicted", "Measured / predicted")
    setup = f"The set-up, once per connection, is another {simulated.setup_bytes / 1e6:.1f} MB and is not in the table."
    notes = (setup, simulated.settings) if simulated.setup_bytes else (simulated.settings,)
    return Table("block", caption, titles, (*rows, ("Rounds (SEMI2K)", *rounds)), notes)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
