"""`evaluate`, `measure` and `verify` on runs trained on CUDA, without a key for the device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from normfree.store.runs import read_run

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]


def printed_value(output: str, name: str) -> float:
    match = re.search(rf"^{name} +([0-9.]+) ", output, re.MULTILINE)
    assert match, output
    return float(match[1])


def test_evaluate_repeats_the_recorded_perplexity(trained: Path, cache: Path, run) -> None:
    status, out, err = run("evaluate", str(trained), f"cache_dir={cache}")
    assert status == 0, err
    recorded = read_run(trained).facts["final"]
    assert printed_value(out, "perplexity") == pytest.approx(recorded["perplexity"], rel=1e-5, abs=1e-4)
    assert printed_value(out, "bits per byte") == pytest.approx(recorded["bits_per_byte"], rel=1e-5, abs=1e-4)
    for dtype, tolerance in (("bf16", 0.02), ("fp16", 0.005)):
        status, out, err = run("evaluate", str(trained), f"cache_dir={cache}", f"dtype={dtype}")
        assert status == 0, err
        assert printed_value(out, "perplexity") == pytest.approx(recorded["perplexity"], rel=tolerance)


def test_evaluating_a_text_agrees_on_both_devices(trained: Path, tmp_path: Path, run) -> None:
    (tmp_path / "text.py").write_text("def f(x):\n    return x\n" * 20)
    perplexities = []
    for device in (DEVICE, "cpu"):
        words = [f"text={tmp_path / 'text.py'}", "stride=4", f"device={device}"]
        status, out, err = run("evaluate", str(trained), *words)
        assert status == 0, err
        perplexities.append(printed_value(out, "perplexity"))
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5, abs=2e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.02), ("fp16", 0.005)])
def test_measure_repeats_the_final_entropies(
    dtype: str, tolerance: float, trained: Path, cache: Path, tmp_path: Path, run
) -> None:
    output = tmp_path / "heads"
    words = [f"cache_dir={cache}", "sequences=16", "batch=4", f"dtype={dtype}", f"output={output}"]
    status, out, err = run("measure", str(trained), *words)
    assert status == 0, err
    measured = read_run(output)
    assert measured.facts["measurement"]["device"].startswith(DEVICE)
    assert measured.facts["measurement"]["peak_memory_mib"] > 0
    recorded = torch.tensor(read_run(trained).last("final", "entropy_nats"))
    torch.testing.assert_close(torch.tensor(measured.last("final", "entropy_nats")), recorded, atol=tolerance, rtol=0)
    assert "peak memory" in out
    assert not torch.tensor(measured.last("final", "nonfinite_rows")).any()


def test_verify_finds_every_part_sound(trained: Path, cache: Path, run) -> None:
    status, out, err = run("verify", str(trained), f"cache_dir={cache}")
    assert status == 0, out + err
    assert "damaged" not in out
    assert out.count("sound") >= 5
    assert read_run(trained).facts["environment"]["device"] == torch.cuda.get_device_name()
