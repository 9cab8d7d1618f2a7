"""The simulator is not installed here: what a user without it meets, and the real thing where it is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from normfree.cli import main
from normfree.cost import of_config
from normfree.cost.calibrate import ELEMENTS, MEASURABLE, calibrate, calibration_table
from normfree.cost.constants import load_constants

FAKE = f"""#!{sys.executable}
# Answers like simulator.py, with a set-up, a price per element and one per row: 1,000,000 + 7 elements + 11 rows.
import json, sys
if "-c" in sys.argv:
    sys.exit()
job = json.load(sys.stdin)
answers = [[1_000_000 + 7 * rows * length + 11 * rows, 5 + 8 * (length - 1).bit_length(), 0]
           for rows, length in job["shapes"]]
print(json.dumps({{"traffic": answers, "versions": {{"spu": "0.0.1"}}, "fraction_bits": 18}}))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python whose simulator is known, in an otherwise empty working folder."""
    python = tmp_path / "fake-python"
    python.write_text(FAKE)
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return python


@pytest.mark.parametrize("python", [sys.executable, "/no/such/python"])
def test_a_python_without_the_simulator_is_told_how_to_get_it(python: str) -> None:
    with pytest.raises(ValueError, match=r"pip install 'spu==0\.9\.5'"):
        calibrate(Path(python))


def test_without_an_environment_the_command_says_how_to_make_one_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NORMFREE_SPU_PYTHON", raising=False)
    assert main(["cost", "calibrate"]) == 1
    error = capsys.readouterr().err.strip()
    assert "no SPU simulator: cannot run spu/bin/python" in error
    assert "python3.11 -m venv spu && spu/bin/pip install" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["protocol=semi2"], "unknown protocol 'semi2'; did you mean semi2k"),
        (
            ["constants=nowhere.json"],
            "constants=nowhere.json does not exist; name a file that `normfree cost calibrate",
        ),
        (["output=."], "output=. is a folder: name a file, e.g. output=constants.json"),
        (["constants=text.json"], "constants=text.json is not readable as JSON"),
        (["constants=other.json"], "other.json has version 7"),
        (["output=text.json"], "output=text.json exists: add constants=text.json"),
        (["output=text.json", "constants=nowhere.json"], "output=text.json exists: add constants=text.json"),
        (["pyton=spu/bin/python"], "unknown key 'pyton' for normfree cost calibrate; did you mean python"),
        (["all"], "normfree cost calibrate takes key=value only, got 'all'"),
    ],
)
def test_wrong_input_is_refused_by_name(
    words: list[str], message: str, fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.json").write_text("text")
    Path("other.json").write_text('{"version": 7}')
    python = [] if words[0].startswith("pyton") else [f"python={fake}"]
    assert main(["cost", "calibrate", *python, *words]) != 0
    assert message in capsys.readouterr().err
    assert not Path("constants.json").exists()


@pytest.mark.parametrize("protocol", ["semi2k", "cheetah"])
def test_measured_prices_replace_the_recorded_ones_with_their_origin(
    protocol: str, fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", "calibrate", f"python={fake}", f"protocol={protocol}"]) == 0
    recorded, content = load_constants(), load_constants(Path("constants.json"))
    changed = content["protocols"][protocol]["operations"]
    assert changed["softmax"] == {
        "bytes_per_element": 7.0,
        "bytes_per_row": 11.0,
        "rounds": 5,
        "rounds_per_row_doubling": 8,
        "origin": changed["relu"]["origin"],
    }
    origin = content["origins"][changed["relu"]["origin"]]
    assert all(part in origin for part in ("spu 0.0.1", "18 fractional bits", f"{ELEMENTS[0]:,}", "row lengths"))
    for name, price in recorded["protocols"][protocol]["operations"].items():
        assert (changed[name] == price) == (name not in MEASURABLE)
    other = {"semi2k": "cheetah", "cheetah": "semi2k"}[protocol]
    assert content["protocols"][other] == recorded["protocols"][other]
    assert "use them with `normfree cost MODEL constants=constants.json`" in capsys.readouterr().out


def test_a_model_is_priced_with_the_constants_given(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "calibrate", f"python={fake}", "output=mine.json"]) == 0
    assert main(["cost", "gpt2-t128", "protocol=semi2k", "constants=mine.json"]) == 0
    assert "; calibrated 2" in capsys.readouterr().out
    config = {"model_type": "normfree", "activation": "relu"}
    items = of_config(config, protocol="semi2k", constants="mine.json").items
    found = {item.count.operation: item.bytes for item in items}
    assert found["layernorm"] == pytest.approx(7 * 128 * 768 + 11 * 128)
    in_rows_of_128 = 7 + 11 / 128  # what a row costs is in the price of an element
    assert found["relu"] == pytest.approx(in_rows_of_128 * 128 * 3072, rel=1e-4)


def test_two_protocols_meet_in_one_file(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMFREE_SPU_PYTHON", str(fake))
    assert main(["cost", "calibrate"]) == 0
    assert main(["cost", "calibrate", "protocol=cheetah", "constants=constants.json", "output=constants.json"]) == 0
    protocols = json.loads(Path("constants.json").read_text())["protocols"]
    assert all("; calibrated" in protocol["about"] for protocol in protocols.values())


def test_an_operation_without_a_price_is_measured_for_the_first_time(
    fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/extending.md sends its readers here; a recorded price of 0 has no relative difference either."""
    content = load_constants()
    del content["protocols"]["semi2k"]["operations"]["silu"]
    content["protocols"]["semi2k"]["operations"]["relu"] |= {"bytes_per_element": 0, "bytes_per_row": 0}
    Path("mine.json").write_text(json.dumps(content))
    assert (
        main(["cost", "calibrate", f"python={fake}", "constants=mine.json", f"output={Path('mine.json').resolve()}"])
        == 0
    )
    assert load_constants(Path("mine.json"))["protocols"]["semi2k"]["operations"]["silu"]["bytes_per_element"] > 0
    rows = {line.split("|")[1].strip(): line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line}
    assert [cell.strip() for cell in rows["silu"][4:6]] == ["-", "-"]
    assert [cell.strip() for cell in rows["relu"][4:6]] == ["0.0", "-"]


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.write_text('#!/bin/sh\n[ "$1" = -c ] || touch measured\n')
    Path("text").write_text("a file")
    assert main(["cost", "calibrate", f"python={fake}", "output=text/mine.json"]) == 1
    assert "is a file; name a folder" in capsys.readouterr().err
    assert not Path("measured").exists()


def test_unknown_operation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown operation 'softmaxx'; did you mean softmax"):
        calibrate(Path(sys.executable), operations=["softmaxx"])


@pytest.mark.slow
@pytest.mark.skipif("NORMFREE_SPU_PYTHON" not in os.environ, reason="NORMFREE_SPU_PYTHON names no Python with SPU")
def test_semi2k_prices_are_what_the_simulator_sends() -> None:
    found = calibrate(protocol="semi2k")
    for one in found:
        assert one.bytes_per_element == pytest.approx(one.recorded_bytes_per_element, rel=1e-3)
        assert one.rounds == one.recorded_rounds
    assert len(calibration_table(found, protocol="semi2k").rows) == len(found)
