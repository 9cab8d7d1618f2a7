"""One block in a fake simulator, and in the real one if it is installed.

T tokens, E hidden size, H heads
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.private_inference.measure import block_inputs, main, predict_traffic, simulate_block
from normfree.cost.totals import of_config
from normfree.model import NormFreeConfig, NormFreeForCausalLM
from tests.synthetic import write_run

FAKE = f"""#!{sys.executable}
# Answers like simulator.py: the block changes nothing and sends 5 MB, of which 2 are of products, after a set-up of 9.
import json, sys
import numpy as np
if "-c" in sys.argv:
    sys.exit()
job = json.load(sys.stdin)
np.savez(job["output"], output=np.load(job["inputs"])["hidden"])
setup = 9_000_000 if job["protocol"] == "cheetah" else 0
answers = [[setup + copies * 5_000_000, 77 * copies, copies * 2_000_000] for copies in job["copies"]]
print(json.dumps({{"traffic": answers, "settings": "spu 0.0.1, 18 fractional bits"}}))
"""
VARIANTS: dict[str, dict[str, Any]] = {
    "sm-r": {"norm": "none", "activation": "relu"},
    "sm-ln-g, every bias": {"norm": "layernorm", "activation": "gelu", "bias": "all"},
    "gelu_tanh, no bias": {"norm": "none", "activation": "gelu_tanh", "bias": "none"},
    "pythia": {"norm": "layernorm", "activation": "gelu", "position": "rotary", "residual": "parallel"},
    "leaky, fixed": {"norm": "none", "activation": "leaky_relu", "negative_slope": 0.2},
    "leaky, per layer": {"norm": "none", "activation": "leaky_relu", "learnable_slope": "per_layer"},
    "leaky, shared, mixed": {"norm": "none", "activation": ["relu", "leaky_relu"], "learnable_slope": "shared"},
    "identity": {"norm": "none", "activation": "identity"},
}


def model_of(variant: str) -> NormFreeForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    model = NormFreeForCausalLM(NormFreeConfig(**sizes, max_position_embeddings=16, **VARIANTS[variant])).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # every bias, scale and slope away from 0, 1 and 0.01
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# The simulator multiplies the matrices of the two heads one after another: two products, two rounds each. It rotates in
# four products and not one, and two norms of the same input share all but the product with the scale (32 rounds).
MORE_ROUNDS = dict.fromkeys(VARIANTS, 4) | {"pythia": 4 + 3 - 32}
IDS_1T = torch.arange(12)[None]


def block_in_numpy(arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> np.ndarray:
    """The block from what the simulator is given, written out."""

    def norm(x_TE: np.ndarray, name: str) -> np.ndarray:
        if settings["norm"] == "none":
            return x_TE
        scaled_TE = (x_TE - x_TE.mean(-1, keepdims=True)) / np.sqrt(x_TE.var(-1, keepdims=True) + 1e-5)
        return scaled_TE * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    def linear(x_TE: np.ndarray, name: str) -> np.ndarray:
        return x_TE @ arrays[f"{name}.weight"].T + arrays.get(f"{name}.bias", 0)

    def rotated(x_HTD: np.ndarray) -> np.ndarray:
        if "cosines" not in arrays:
            return x_HTD
        half = arrays["cosines"].shape[1] // 2
        angles = (arrays["cosines"] + 1j * arrays["sines"])[:, :half]
        turned = (x_HTD[..., :half] + 1j * x_HTD[..., half : 2 * half]) * angles
        return np.concatenate([turned.real, turned.imag, x_HTD[..., 2 * half :]], axis=-1)

    def activate(x: np.ndarray) -> np.ndarray:
        slope, tensor = arrays.get("slope", settings["negative_slope"]), torch.tensor(x)
        known = {
            "relu": np.maximum(x, 0),
            "leaky_relu": np.where(x > 0, x, slope * x),
            "identity": x,
            "gelu": torch.nn.functional.gelu(tensor).numpy(),
            "gelu_tanh": torch.nn.functional.gelu(tensor, approximate="tanh").numpy(),
        }
        return known[settings["activation"]]

    hidden_TE = arrays["hidden"]
    tokens, width = hidden_TE.shape
    qkv_TE = linear(norm(hidden_TE, "attention_norm"), "attention.qkv")
    query, key, value = (
        part_TE.reshape(tokens, settings["heads"], -1).swapaxes(0, 1) for part_TE in np.split(qkv_TE, 3, axis=1)
    )
    weights_HTT = np.tril(np.exp(rotated(query) @ rotated(key).swapaxes(1, 2)))
    weights_HTT /= weights_HTT.sum(-1, keepdims=True)
    attended_TE = hidden_TE + linear((weights_HTT @ value).swapaxes(0, 1).reshape(tokens, width), "attention.output")
    source_TE = hidden_TE if settings["residual"] == "parallel" else attended_TE
    features_TF = activate(linear(norm(source_TE, "feed_forward_norm"), "feed_forward.input"))
    return attended_TE + linear(features_TF, "feed_forward.output")


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_simulator_s_inputs_give_pytorch_s_output(variant: str, layer: int) -> None:
    model = model_of(variant)
    inputs = block_inputs(model, IDS_1T, layer=layer)
    assert not any(module._forward_hooks for module in model.modules())
    assert inputs.arrays["hidden"].shape == inputs.output_TE.shape == (12, 32)
    np.testing.assert_allclose(block_in_numpy(inputs.arrays, inputs.settings), inputs.output_TE, atol=2e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer=4"], "layer=4 must be 0 to 3"),
        (["context=33"], "context=33 must be 1 to 32, the longest sequence"),
        (["python=/no/such/python"], r"cannot run python=/no/such/python \(No such file or directory\); make an"),
        (
            [f"python={sys.executable}"],
            r"cannot import spu and jax \(ModuleNotFoundError: No module named 'spu'\); make an environment with",
        ),
    ],
)
def test_wrong_input_says_what_to_do(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main([str(write_run(tmp_path, "SM+R").folder), *words])


def test_a_run_is_needed() -> None:
    with pytest.raises(ValueError, match="name a run folder first"):
        main(["layer=1"])


@pytest.mark.parametrize("protocol", ["semi2k", "cheetah"])
def test_measured_stands_beside_predicted(
    protocol: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python, text = tmp_path / "fake-python", tmp_path / "text.py"
    python.write_text(FAKE)
    python.chmod(0o755)
    text.write_text("def add(first, second):\n    return first + second\n" * 5)
    words = [f"python={python}", f"protocol={protocol}", "layer=1", "context=16", f"text={text}"]
    main([str(trained), *words])
    out = capsys.readouterr().out
    rows = {cells[1].strip(): cells[2:4] for cells in (line.split("|") for line in out.splitlines()) if len(cells) > 4}
    measured = {name: float(cells[0]) for name, cells in list(rows.items())[2:]}
    assert measured == {
        "MB, matrix products": 2.0,
        "MB, everything else": 3.0,
        "MB, the block": 5.0,
        "Rounds (SEMI2K)": 77.0,
    }
    config = {"model_type": "normfree", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    cost = of_config({**config, "vocab_size": 300, "norm": "none", "activation": "relu"}, context=16, protocol=protocol)
    block = [item for item in cost.items if item.count.layer == 1]
    assert float(rows["MB, the block"][1]) == pytest.approx(sum(item.bytes for item in block) / 1e6, abs=0.006)
    assert int(rows["Rounds (SEMI2K)"][1]) == sum(item.rounds for item in block)
    assert ("another 9.0 MB" in out) == (protocol == "cheetah")
    error = re.search(r"Largest absolute error against PyTorch: (\S+)", out)
    assert error is not None
    assert float(error[1]) > 1e-3  # this fake block returns its input


@pytest.mark.slow
@pytest.mark.skipif("NORMFREE_SPU_PYTHON" not in os.environ, reason="NORMFREE_SPU_PYTHON names no Python with SPU")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_simulated_block_agrees_with_prediction_and_pytorch(variant: str) -> None:
    model = model_of(variant)
    cost = of_config(model.config, context=12, protocol="semi2k")
    inputs = block_inputs(model, IDS_1T, layer=1)
    simulated = simulate_block(os.environ["NORMFREE_SPU_PYTHON"], inputs, "semi2k")
    predicted = predict_traffic(cost, layer=1)
    assert simulated.traffic.bytes == pytest.approx(predicted.bytes, rel=0.02)
    assert simulated.traffic.rounds - predicted.rounds == pytest.approx(MORE_ROUNDS[variant], abs=1)
    assert np.abs(simulated.output_TE - inputs.output_TE).max() < 2e-3 * np.abs(inputs.output_TE).max()
