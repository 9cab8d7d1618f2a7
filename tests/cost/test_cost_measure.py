"""One real block in the simulator: what is taken out of PyTorch, what is said, and the real thing where it is.

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

from normfree.cli import main
from normfree.cost import of_config
from normfree.cost.block import simulate_block
from normfree.cost.environment import find_python
from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.simulate import block_inputs
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
print(json.dumps({{"traffic": answers, "versions": {{"spu": "0.0.1"}}, "fraction_bits": 18}}))
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
def test_what_the_simulator_is_given_makes_the_output_of_pytorch(variant: str, layer: int) -> None:
    inputs = block_inputs(model_of(variant), IDS_1T, layer=layer)
    assert inputs.arrays["hidden"].shape == inputs.output_TE.shape == (12, 32)
    np.testing.assert_allclose(block_in_numpy(inputs.arrays, inputs.settings), inputs.output_TE, atol=2e-5)


def test_the_block_is_left_without_hooks() -> None:
    model = model_of("sm-r")
    block_inputs(model, IDS_1T, layer=1)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer=4"], "layer=4 must be 0 to 3: {run} has 4 layers"),
        (["layer=-1"], "layer=-1 must be 0 to 3"),
        (["layer=first"], "layer=first: Input should be a valid integer"),
        (["tokens=33"], "tokens=33 must be 2 to 32, the longest sequence of {run}"),
        (["protocol=cheeta"], "unknown protocol 'cheeta'; did you mean cheetah"),
        (["constants=nowhere.json"], "constants=nowhere.json does not exist"),
        ([], "no SPU simulator: cannot run spu/bin/python (No such file or directory); make the environment"),
        (["python=/no/such/python"], "no SPU simulator: cannot run /no/such/python"),
        (
            [f"python={sys.executable}"],
            "cannot import spu and jax (ModuleNotFoundError: No module named 'spu'); make the environment (about 1 GB) "
            "with: python3.11",
        ),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_do(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NORMFREE_SPU_PYTHON", raising=False)
    run = write_run(tmp_path, "SM+R").folder
    assert main(["cost", "measure", str(run), *words]) != 0
    captured = capsys.readouterr()
    assert message.format(run=run) in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not captured.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "normfree cost measure needs RUN, got nothing; example: normfree cost measure runs"),
        (["nowhere"], "nowhere is not a run folder: it has no run.json"),
        (["nowhere", "tokns=3"], "unknown key 'tokns' for normfree cost measure; did you mean tokens"),
    ],
)
def test_a_run_is_needed(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "measure", *words]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["cost", "--help"], ["cost", "measure", "--help"], ["--help"]])
def test_help_shows_how_to_measure(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "normfree cost measure runs/quick/sm-r-seed0 python=spu/bin/python" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: list[str], cache: Path) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert main(["train", *tiny, "variant=sm-ln-r", f"runs_dir={runs}", f"cache_dir={cache}"]) == 0
    return runs / "single" / "sm-ln-r-seed0"


@pytest.mark.parametrize("protocol", ["semi2k", "cheetah"])
def test_measured_stands_beside_predicted(
    protocol: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python, text = tmp_path / "fake-python", tmp_path / "text.py"
    python.write_text(FAKE)
    python.chmod(0o755)
    text.write_text("def add(first, second):\n    return first + second\n" * 5)
    words = [f"python={python}", f"protocol={protocol}", "layer=1", "tokens=16", f"text={text}"]
    assert main(["cost", "measure", str(trained), *words]) == 0
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
    cost = of_config({**config, "vocab_size": 300, "activation": "relu"}, context=16, protocol=protocol)
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
def test_a_block_in_the_simulator_sends_what_is_predicted_and_computes_what_pytorch_does(variant: str) -> None:
    model = model_of(variant)
    cost = of_config(model.config, context=12, protocol="semi2k")
    found = simulate_block(find_python(None), block_inputs(model, IDS_1T, layer=1), cost, layer=1)
    assert found.bytes == pytest.approx(found.predicted_bytes, rel=0.02)
    assert found.rounds - found.predicted_rounds == pytest.approx(MORE_ROUNDS[variant], abs=1)
    assert found.largest_error < 2e-3 * found.largest_output
