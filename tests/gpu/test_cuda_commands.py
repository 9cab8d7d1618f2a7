"""`evaluate` and `measure` on runs trained on CUDA, without a key for the device."""

import re
from pathlib import Path

import pytest
import torch

from normfree.store.runs import read_run


def test_evaluate_repeats_the_recorded_perplexity(trained: Path, cache: Path, output) -> None:
    recorded = read_run(trained).facts["final"]
    for dtype, tolerance in (("fp32", 1e-5), ("bf16", 0.02), ("fp16", 0.005)):
        out = output("evaluate", str(trained), f"cache_dir={cache}", f"dtype={dtype}")
        values = dict(re.findall(r"^(\w[\w ]+?)  +([0-9.]+) ", out, re.MULTILINE))
        for name in ("perplexity", "bits per byte"):
            expected = recorded[name.replace(" ", "_")]
            assert float(values[name]) == pytest.approx(expected, rel=tolerance, abs=1e-4), (dtype, name)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.02), ("fp16", 0.005)])
def test_measure_repeats_the_final_entropies(
    dtype: str, tolerance: float, trained: Path, cache: Path, tmp_path: Path, output
) -> None:
    words = [f"cache_dir={cache}", "sequences=16", "batch=4", f"dtype={dtype}", f"output={tmp_path / 'heads'}"]
    assert "peak memory" in output("measure", str(trained), *words)
    measured = read_run(tmp_path / "heads")
    assert measured.facts["measurement"]["device"].startswith("cuda")
    assert measured.facts["measurement"]["peak_memory_mib"] > 0
    recorded = torch.tensor(read_run(trained).last("final", "entropy_nats"))
    torch.testing.assert_close(torch.tensor(measured.last("final", "entropy_nats")), recorded, atol=tolerance, rtol=0)
    assert not torch.tensor(measured.last("final", "nonfinite_rows")).any()
