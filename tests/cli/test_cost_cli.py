"""`normfree cost` at the door."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config

from normfree.cost.families import read_architecture
from normfree.spec.compose import compose_run, compose_unchecked, members, variants

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gpt2-t128", "variant=sm-g"], "| 29.37 |"),
        (["gpt2-t128"], "**gpt2-t128 SM+LN+G, T=128, cheetah: by operation**"),
        ([str(ROOT / "results/removal/sm-fake-g-seed0")], "| gelu\\_erf | activation |"),  # its LayerNorms are gone
        (["gpt2-t128", "activation=gelu_tanh"], "| 25.39 |"),  # within 0.3 % of the published 25.32
        (["gpt2-t128", "protocol=semi2k", "network=lan"], "on lan ("),
        (["gpt2-t128", "bandwidth_mbps=8", "delay_ms=5"], "(8 Mbps each way, 5 ms one way"),
        (["cpu", "variant=sm-rg"], "| layers 6-11 |"),
        (["gpt2-t128", "activation=relu"], "**gpt2-t128 variant=sm-ln-g activation=relu, T=128"),
        (["cpu-quick", "variant=sm-g", "activation=[relu,gelu,gelu,gelu,gelu,gelu]"], "relu"),
        (["gpt2-t128"], "Assumed GPT-2's 50,257 tokens because the real tokenizer is not downloaded."),
    ],
)
def test_cost_of_a_preset(words: list[str], expected: str, output) -> None:
    assert expected in output("cost", *words)


def test_a_short_model_is_priced_at_its_own_length(tmp_path: Path, run) -> None:
    GPT2Config(n_positions=64, n_embd=32, n_head=2, n_layer=2).save_pretrained(tmp_path)
    assert "One sequence of 64 tokens" in run("cost", str(tmp_path))[1]


def test_cost_of_a_run_and_of_its_saved_model_agree(trained: Path, output) -> None:
    names = [str(trained), str(trained / "model")]
    costs = [output("cost", name, "context=16").replace(name.replace("_", "\\_"), "NAME") for name in names]
    assert costs[0] == costs[1]


@pytest.mark.parametrize(
    ("verb", "name", "line"),
    [
        *(("cost", name, f"**{name}") for name in ("gpt2-t128", "gpt2", "results/cpu-lr1e-3/sm-g-seed0")),
        ("verify", "results/quick/sm-g-seed0", "sound   run.json"),
        ("train", "--help", "  train.steps="),
    ],
)
def test_quick_commands_load_neither_torch_nor_the_hub(verb: str, name: str, line: str) -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub'}"
    code = f"import sys; from normfree.cli.main import main; assert main([{verb!r}, {name!r}]) == 0; "
    command = [sys.executable, "-c", code + f"assert not {heavy} & set(sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert line in done.stdout


def test_json_holds_totals_operations_and_every_layer(tmp_path: Path, output) -> None:
    file = tmp_path / "new" / "cost.json"
    out = output("cost", "gpt2", "delay_ms=5", f"output={file}")
    assert f"The numbers: {file}" in out
    record = json.loads(file.read_text())
    assert (record["model"], record["protocol"], record["context"]) == ("gpt2", "cheetah", 128)
    assert record["network"] == {"name": "wan", "bandwidth_mbps": 100, "delay_ms": 5}
    assert record["total"]["bytes"] == pytest.approx(25.39e9, rel=1e-3)
    assert [row["where"] for row in record["layers"] if "layer" in row["where"]] == [f"layer {n}" for n in range(12)]
    for rows in (record["operations"], record["layers"]):
        for key in ("calls", "elements", "bytes", "rounds"):
            assert sum(row[key] for row in rows) == pytest.approx(record["total"][key])


def test_csv_holds_the_numbers_of_the_json(tmp_path: Path, run) -> None:
    for kind in ("json", "csv"):
        assert run("cost", "gpt2-t128", f"output={tmp_path}/cost.{kind}")[0] == 0
    record = json.loads((tmp_path / "cost.json").read_text())
    rows = list(csv.DictReader((tmp_path / "cost.csv").read_text().splitlines()))
    assert {row["model"] for row in rows} == {"gpt2-t128 SM+LN+G"}
    assert {(row["protocol"], row["network"], row["bandwidth_mbps"]) for row in rows} == {("cheetah", "wan", "100.0")}
    scopes = {"total": [record["total"]], "operation": record["operations"], "layer": record["layers"]}
    bytes_of = [(scope, row["bytes"]) for scope, of_scope in scopes.items() for row in of_scope]
    assert [(row["scope"], float(row["bytes"])) for row in rows] == bytes_of


@pytest.mark.parametrize("preset", sorted({*members("preset")} - {"fashion-vit", "denoise"}))
def test_cost_reads_the_model_that_training_builds(preset: str) -> None:
    for variant in set(variants()) - {"custom"}:
        trained = compose_run([f"preset={preset}", f"variant={variant}"]).spec
        read = compose_unchecked({"preset": preset, "variant": variant})
        assert (read.data, read.label) == (trained.data, trained.label)
        models = ({"model_type": "normfree", **spec.model} for spec in (read, trained))
        assert len({read_architecture(model) for model in models}) == 1
