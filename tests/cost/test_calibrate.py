"""Calibration with a fake simulator, and with the real one if it is installed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.private_inference.calibrate import ELEMENTS, ROW_LENGTHS, main, measure_operations
from normfree.cli import main as cli
from normfree.cost.constants import find_protocol, load_constants
from normfree.cost.counts import Rows
from normfree.cost.totals import of_config

FAKE = f"""#!{sys.executable}
# Answers like simulator.py, with a set-up, a price per element and one per row: 1,000,000 + 7 elements + 11 rows.
import json, sys
if "-c" in sys.argv:
    sys.exit()
job = json.load(sys.stdin)
answers = [[1_000_000 + 7 * rows * length + 11 * rows, 5 + 8 * (length - 1).bit_length(), 0]
           for rows, length in job["shapes"]]
print(json.dumps({{"traffic": answers, "settings": "spu 0.0.1, 18 fractional bits"}}))
"""


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
        ([f"python={sys.executable}"], r"python3\.11 -m venv spu && spu/bin/pip install 'spu==0\.9\.5'"),
        (["python=/no/such/python"], r"python3\.11 -m venv spu && spu/bin/pip install 'spu==0\.9\.5'"),
        (["constants=other.json"], "other.json has version 7"),
        (["output=."], "output=. exists: .* or name another"),
        (["output=text.json"], "output=text.json exists: add constants=text.json"),
        (["output=text.json", "constants=nowhere.json"], "output=text.json exists: add constants=text.json"),
    ],
)
def test_wrong_input_is_refused_by_name(words: list[str], message: str, fake: Path) -> None:
    Path("text.json").write_text("text")
    Path("other.json").write_text('{"version": 7}')
    with pytest.raises(ValueError, match=message):
        main([f"python={fake}", *words])
    assert not Path("constants.json").exists()


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match="unknown key pyton; allowed: constants, output, protocol, python"):
        main(["pyton=spu/bin/python"])


@pytest.mark.parametrize("protocol", ["semi2k", "cheetah"])
def test_measured_prices_replace_recorded_ones_with_their_origin(
    protocol: str, fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"python={fake}", f"protocol={protocol}"])
    recorded, content = load_constants(), load_constants(Path("constants.json"))
    changed = content["protocols"][protocol]["operations"]
    price = {"bytes_per_element": 7.0, "bytes_per_row": 11.0, "rounds": 5, "rounds_per_row_doubling": 8}
    assert changed["softmax"] == {**price, "origin": changed["relu"]["origin"]}
    origin = content["origins"][changed["relu"]["origin"]]
    assert all(part in origin for part in ("spu 0.0.1", "18 fractional bits", f"{ELEMENTS[0]:,}", "row lengths"))
    for name, price in recorded["protocols"][protocol]["operations"].items():
        assert (changed[name] == price) == (name not in ROW_LENGTHS)
    other = {"semi2k": "cheetah", "cheetah": "semi2k"}[protocol]
    assert content["protocols"][other] == recorded["protocols"][other]
    assert "use them with `normfree cost MODEL constants=constants.json`" in capsys.readouterr().out


def test_a_model_is_priced_with_the_constants_given(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([f"python={fake}", "output=mine.json"])
    assert cli.main(["cost", "gpt2-t128", "protocol=semi2k", "constants=mine.json"]) == 0
    assert "; calibrated 2" in capsys.readouterr().out
    config = {"model_type": "normfree", "activation": "relu"}
    items = of_config(config, protocol="semi2k", constants="mine.json").items
    bytes_by_operation = {item.count.operation: item.bytes for item in items}
    assert bytes_by_operation["layernorm"] == pytest.approx(7 * 128 * 768 + 11 * 128)
    in_rows_of_128 = 7 + 11 / 128  # what a row costs is in the price of an element
    assert bytes_by_operation["relu"] == pytest.approx(in_rows_of_128 * 128 * 3072, rel=1e-4)


def test_an_operation_without_a_price_is_measured(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As docs/extending.md sends its readers here; a recorded price of 0 has no relative difference either."""
    content = load_constants()
    del content["protocols"]["semi2k"]["operations"]["silu"]
    content["protocols"]["semi2k"]["operations"]["relu"] |= {"bytes_per_element": 0, "bytes_per_row": 0}
    Path("mine.json").write_text(json.dumps(content))
    main([f"python={fake}", "constants=mine.json", f"output={Path('mine.json').resolve()}"])
    assert load_constants(Path("mine.json"))["protocols"]["semi2k"]["operations"]["silu"]["bytes_per_element"] > 0
    rows = {line.split("|")[1].strip(): line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line}
    assert [cell.strip() for cell in rows["silu"][4:6]] == ["-", "-"]
    assert [cell.strip() for cell in rows["relu"][4:6]] == ["0.0", "-"]


def test_an_unwritable_output_is_refused_before_measuring(fake: Path) -> None:
    fake.write_text("#!/bin/sh\ntouch measured\n")
    Path("text").write_text("a file")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        main([f"python={fake}", "output=text/mine.json"])
    assert not Path("measured").exists()


@pytest.mark.slow
@pytest.mark.skipif("NORMFREE_SPU_PYTHON" not in os.environ, reason="NORMFREE_SPU_PYTHON names no Python with SPU")
def test_semi2k_prices_are_what_the_simulator_sends() -> None:
    prices = find_protocol("semi2k")
    for one in measure_operations(os.environ["NORMFREE_SPU_PYTHON"], "semi2k")[0]:
        row = Rows(layer=None, part="", operation=one.operation, rows=1, length=one.row_length)
        recorded_bytes, recorded_rounds = prices.price(row)
        assert one.row_length * one.bytes_per_element == pytest.approx(recorded_bytes, rel=1e-3)
        assert one.rounds == recorded_rounds
