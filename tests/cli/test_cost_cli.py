"""`normfree cost` at the door."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config

from tests.cli.commands import run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gpt2-t128", "variant=sm-g"], "| 29.37 |"),
        (["gpt2-t128", "activation=gelu_tanh"], "| 25.39 |"),  # within 0.3 % of the published 25.32
        (["gpt2-t128", "activation=gelu_tanh", "context=256"], "| 58.57 |"),  # published: 58.51
        (["gpt2-t128", "protocol=semi2k", "network=lan"], "semi2k"),
        (["gpt2-t128", "network=lan"], "on lan ("),
        (["gpt2-t128", "bandwidth_mbps=8", "delay_ms=5"], "(8 Mbps each way, 5 ms one way"),
        (["cpu-quick", "variant=sm-rg"], "relu"),
        (["cpu-quick", "variant=sm-g", "activation=[relu,gelu,gelu,gelu]"], "relu"),
        (["pythia70m-t256"], "T=256"),
    ],
)
def test_cost_of_a_preset(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run("cost", *words, capsys=capsys)
    assert status == 0, err
    assert expected in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cpu", "variant="], "unknown variant ''"),
        (["cpu", "variant=sm-r", "activation="], "activation='' has no known cost"),
        (["gpt2-t18"], "presets: did you mean gpt2-t128"),
        (["cpu", "activation=[relu]"], "activation lists 1 names, but num_hidden_layers is 12"),
    ],
)
def test_what_no_preset_is_or_has_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run("cost", *words, capsys=capsys)
    assert status == 1
    assert message in err


def test_a_preset_says_which_vocabulary_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "GPT-2's 50,257 pieces stand for" in run("cost", "gpt2-t128", capsys=capsys)[1]
    assert "stand for" not in run("cost", "cpu", capsys=capsys)[1]


def test_a_short_model_is_priced_at_its_own_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2Config(n_positions=64, n_embd=32, n_head=2, n_layer=2).save_pretrained(tmp_path)
    assert "One sequence of 64 tokens" in run("cost", str(tmp_path), capsys=capsys)[1]


def test_cost_of_a_run_and_of_its_saved_model_agree(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = []
    for name in (trained, trained / "model"):
        status, out, err = run("cost", str(name), "context=16", capsys=capsys)
        assert status == 0, err
        costs.append(out)
    assert costs[0] == costs[1]
