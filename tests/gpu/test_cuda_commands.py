"""`evaluate`, `measure` and `verify` on runs trained on CUDA, without a key for the device."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from normfree.store.runs import read_run

Values = Callable[..., dict[str, float]]


@pytest.fixture
def evaluated(trained: Path, run) -> Values:
    """`evaluated(*words)` evaluates the run and reads the numbers that it prints."""

    def evaluate(*words: str) -> dict[str, float]:
        status, out, err = run("evaluate", str(trained), *words)
        assert status == 0, err
        return {name: float(value) for name, value in re.findall(r"^(\w[\w ]+?)  +([0-9.]+) ", out, re.MULTILINE)}

    return evaluate


def test_evaluate_repeats_the_recorded_perplexity(trained: Path, cache: Path, evaluated: Values) -> None:
    recorded = read_run(trained).facts["final"]
    values = evaluated(f"cache_dir={cache}")
    assert values["perplexity"] == pytest.approx(recorded["perplexity"], rel=1e-5, abs=1e-4)
    assert values["bits per byte"] == pytest.approx(recorded["bits_per_byte"], rel=1e-5, abs=1e-4)
    for dtype, tolerance in (("bf16", 0.02), ("fp16", 0.005)):
        values = evaluated(f"cache_dir={cache}", f"dtype={dtype}")
        assert values["perplexity"] == pytest.approx(recorded["perplexity"], rel=tolerance)


def test_evaluating_a_text_agrees_on_both_devices(tmp_path: Path, evaluated: Values) -> None:
    (tmp_path / "text.py").write_text("def f(x):\n    return x\n" * 20)
    words = [f"text={tmp_path / 'text.py'}", "stride=4"]
    on_gpu, on_cpu = (evaluated(*words, f"device={device}")["perplexity"] for device in ("cuda", "cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-5, abs=2e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.02), ("fp16", 0.005)])
def test_measure_repeats_the_final_entropies(
    dtype: str, tolerance: float, trained: Path, cache: Path, tmp_path: Path, run
) -> None:
    output = tmp_path / "heads"
    words = [f"cache_dir={cache}", "sequences=16", "batch=4", f"dtype={dtype}", f"output={output}"]
    status, out, err = run("measure", str(trained), *words)
    assert status == 0, err
    measured = read_run(output)
    assert measured.facts["measurement"]["device"].startswith("cuda")
    assert measured.facts["measurement"]["peak_memory_mib"] > 0
    recorded = torch.tensor(read_run(trained).last("final", "entropy_nats"))
    torch.testing.assert_close(torch.tensor(measured.last("final", "entropy_nats")), recorded, atol=tolerance, rtol=0)
    assert "peak memory" in out
    assert not torch.tensor(measured.last("final", "nonfinite_rows")).any()
