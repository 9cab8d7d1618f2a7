"""The scripts of benchmarks/private_inference with a fake simulator, and with the real one if it is installed.

T tokens, E hidden size, H heads
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.private_inference import calibrate, measure
from normfree.cli import main as cli
from normfree.cost.constants import find_protocol, load_constants
from normfree.cost.counts import Rows
from normfree.cost.totals import of_config
from normfree.model import NormFreeConfig, NormFreeForCausalLM
from tests.synthetic import write_run

FAKE = f"""#!{sys.executable}
# Answers like simulator.py. Operations cost a set-up, a price per element and one per row: 1,000,000 + 7 elements + 11
# rows. A block changes nothing and sends 5 MB, of which 2 are of products, after a set-up of 9.
import json, sys
import numpy as np
if "-c" in sys.argv:
    sys.exit()
job = json.load(sys.stdin)
answers = [[1_000_000 + 7 * rows * length + 11 * rows, 5 + 8 * (length - 1).bit_length(), 0]
           for rows, length in job.get("shapes", ())]
if "copies" in job:
    np.savez(job["output"], output=np.load(job["inputs"])["hidden"])
    setup = 9_000_000 if job["protocol"] == "cheetah" else 0
    answers = [[setup + copies * 5_000_000, 77 * copies, copies * 2_000_000] for copies in job["copies"]]
print(json.dumps({{"traffic": answers, "settings": "spu 0.0.1, 18 fractional bits"}}))
"""
with_simulator = pytest.mark.skipif(
    "NORMFREE_SPU_PYTHON" not in os.environ, reason="NORMFREE_SPU_PYTHON names no Python with SPU"
)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python whose simulator is known, in an otherwise empty working folder."""
    python = tmp_path / "fake-python"
    python.write_text(FAKE)
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return python


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["protocol=semi2"], "unknown protocol 'semi2'; did you mean semi2k"),
        (["constants=nowhere.json"], "constants=nowhere.json cannot be read .*; name a file of constants"),
        (["constants=text.json"], "constants=text.json cannot be read"),
        (["python=/no/such/python"], r"python3\.11 -m venv spu && spu/bin/pip install 'spu==0\.9\.5'"),
        (["output=text.json"], "output=text.json exists: add constants=text.json .* or name another"),
        (["output=text.json/mine.json"], "is a file; name a folder"),
    ],
)
def test_wrong_input_is_refused_by_name(words: list[str], message: str, fake: Path) -> None:
    Path("text.json").write_text("text")
    with pytest.raises(ValueError, match=message):
        calibrate.main([f"python={fake}", *words])
    assert not Path("constants.json").exists()


@pytest.mark.parametrize("protocol", ["semi2k", "cheetah"])
def test_measured_prices_with_their_origin_are_those_that_count(protocol: str, fake: Path, capsys) -> None:
    calibrate.main([f"python={fake}", f"protocol={protocol}"])
    recorded, content = load_constants(), load_constants(Path("constants.json"))
    changed = content["protocols"][protocol]["operations"]
    price = {"bytes_per_element": 7.0, "bytes_per_row": 11.0, "rounds": 5, "rounds_per_row_doubling": 8}
    assert changed["softmax"] == {**price, "origin": changed["relu"]["origin"]}
    origin = content["origins"][changed["relu"]["origin"]]
    for part in ("spu 0.0.1", "18 fractional bits", f"{calibrate.ELEMENTS[0]:,}", "row lengths"):
        assert part in origin
    for name, price in recorded["protocols"][protocol]["operations"].items():
        assert (changed[name] == price) == (name not in calibrate.ROW_LENGTHS)
    other = {"semi2k": "cheetah", "cheetah": "semi2k"}[protocol]
    assert content["protocols"][other] == recorded["protocols"][other]
    assert "use them with `normfree cost MODEL constants=constants.json`" in capsys.readouterr().out
    assert cli.main(["cost", "gpt2-t128", f"protocol={protocol}", "constants=constants.json"]) == 0
    assert "; calibrated 2" in capsys.readouterr().out
    config = {"model_type": "normfree", "activation": "relu"}
    items = of_config(config, protocol=protocol, constants="constants.json").items
    bytes_by_operation = {item.count.operation: item.bytes for item in items}
    assert bytes_by_operation["layernorm"] == pytest.approx(7 * 128 * 768 + 11 * 128)
    in_rows_of_128 = 7 + 11 / 128  # what a row costs is in the price of an element
    assert bytes_by_operation["relu"] == pytest.approx(in_rows_of_128 * 128 * 3072, rel=1e-4)


def test_an_operation_without_a_price_is_measured(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = load_constants()
    del content["protocols"]["semi2k"]["operations"]["silu"]
    Path("mine.json").write_text(json.dumps(content))
    calibrate.main([f"python={fake}", "constants=mine.json", f"output={Path('mine.json').resolve()}"])
    assert load_constants(Path("mine.json"))["protocols"]["semi2k"]["operations"]["silu"]["bytes_per_element"] > 0
    rows = {line.split("|")[1].strip(): line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line}
    assert [cell.strip() for cell in rows["silu"][4:6]] == ["-", "-"]


@pytest.mark.slow
@with_simulator
def test_semi2k_prices_are_what_the_simulator_sends() -> None:
    prices = find_protocol("semi2k")
    for one in calibrate.measure_operations(os.environ["NORMFREE_SPU_PYTHON"], "semi2k")[0]:
        row = Rows(layer=None, part="", operation=one.operation, rows=1, length=one.row_length)
        recorded_bytes, recorded_rounds = prices.price(row)
        assert one.row_length * one.bytes_per_element == pytest.approx(recorded_bytes, rel=1e-3)
        assert one.rounds == recorded_rounds


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


def block_in_pytorch(arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> np.ndarray:
    """The block from what the simulator is given, written out."""
    tensors = {name: torch.tensor(value) for name, value in arrays.items()}
    slope = np.ravel(arrays.get("slope", settings["negative_slope"])).item()
    activations = {
        **{"relu": F.relu, "identity": lambda x: x, "leaky_relu": partial(F.leaky_relu, negative_slope=slope)},
        **{"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")},
    }

    def norm(x_TE: Tensor, name: str) -> Tensor:
        if settings["norm"] == "none":
            return x_TE
        return F.layer_norm(x_TE, x_TE.shape[1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def linear(x_TE: Tensor, name: str) -> Tensor:
        return F.linear(x_TE, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def rotated(x_HTD: Tensor) -> Tensor:
        if "cosines" not in tensors:
            return x_HTD
        half = tensors["cosines"].shape[1] // 2
        first, second, rest = x_HTD.tensor_split([half, 2 * half], dim=-1)
        turned = torch.complex(first, second) * torch.complex(tensors["cosines"], tensors["sines"])[:, :half]
        return torch.cat([turned.real, turned.imag, rest], dim=-1)

    hidden_TE = tensors["hidden"]
    parts = linear(norm(hidden_TE, "attention_norm"), "attention.qkv").chunk(3, dim=1)
    query, key, value = (part_TE.unflatten(1, (settings["heads"], -1)).transpose(0, 1) for part_TE in parts)
    heads_HTD = F.scaled_dot_product_attention(rotated(query), rotated(key), value, is_causal=True, scale=1.0)
    attended_TE = hidden_TE + linear(heads_HTD.transpose(0, 1).flatten(1), "attention.output")
    source_TE = hidden_TE if settings["residual"] == "parallel" else attended_TE
    features_TF = linear(norm(source_TE, "feed_forward_norm"), "feed_forward.input")
    return (attended_TE + linear(activations[settings["activation"]](features_TF), "feed_forward.output")).numpy()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_simulator_s_inputs_give_pytorch_s_output(variant: str, layer: int) -> None:
    model = model_of(variant)
    inputs = measure.block_inputs(model, IDS_1T, layer=layer)
    assert not any(module._forward_hooks for module in model.modules())
    assert inputs.arrays["hidden"].shape == inputs.output_TE.shape == (12, 32)
    np.testing.assert_allclose(block_in_pytorch(inputs.arrays, inputs.settings), inputs.output_TE, atol=2e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer=4"], "layer=4 must be 0 to 3"),
        (["context=33"], "context=33 must be 1 to 32, the longest sequence"),
        ([f"python={sys.executable}"], r"cannot import spu and jax \(ModuleNotFoundError: .*'spu'\); make an env"),
    ],
)
def test_a_block_that_cannot_be_simulated_says_what_to_do(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        measure.main([str(write_run(tmp_path, "SM+R").folder), *words])
    with pytest.raises(ValueError, match="name a run folder first"):
        measure.main(words)


@pytest.mark.parametrize("protocol", ["semi2k", "cheetah"])
def test_measured_stands_beside_predicted(protocol: str, trained: Path, fake: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.py"
    text.write_text("def add(first, second):\n    return first + second\n" * 5)
    words = [f"python={fake}", f"protocol={protocol}", "layer=1", "context=16", f"text={text}"]
    measure.main([str(trained), *words])
    out = capsys.readouterr().out
    rows = {cells[1].strip(): cells[2:4] for cells in (line.split("|") for line in out.splitlines()) if len(cells) > 4}
    measured = {name: float(cells[0]) for name, cells in list(rows.items())[2:]}
    expected = {"MB, matrix products": 2.0, "MB, everything else": 3.0, "MB, the block": 5.0, "Rounds (SEMI2K)": 77.0}
    assert measured == expected
    config = {"model_type": "normfree", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    cost = of_config({**config, "vocab_size": 300, "norm": "none", "activation": "relu"}, context=16, protocol=protocol)
    block = [item for item in cost.items if item.count.layer == 1]
    assert float(rows["MB, the block"][1]) == pytest.approx(sum(item.bytes for item in block) / 1e6, abs=0.006)
    assert int(rows["Rounds (SEMI2K)"][1]) == sum(item.rounds for item in block)
    assert ("another 9.0 MB" in out) == (protocol == "cheetah")
    error = re.search(r"Largest absolute error against PyTorch: (\S+)", out)
    assert float(error[1]) > 1e-3  # this fake block returns its input


@pytest.mark.slow
@with_simulator
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_simulated_block_agrees_with_prediction_and_pytorch(variant: str) -> None:
    model = model_of(variant)
    cost = of_config(model.config, context=12, protocol="semi2k")
    inputs = measure.block_inputs(model, IDS_1T, layer=1)
    simulated = measure.simulate_block(os.environ["NORMFREE_SPU_PYTHON"], inputs, "semi2k")
    predicted = measure.predict_traffic(cost, layer=1)
    assert simulated.traffic.bytes == pytest.approx(predicted.bytes, rel=0.02)
    assert simulated.traffic.rounds - predicted.rounds == pytest.approx(MORE_ROUNDS[variant], abs=1)
    assert np.abs(simulated.output_TE - inputs.output_TE).max() < 2e-3 * np.abs(inputs.output_TE).max()
