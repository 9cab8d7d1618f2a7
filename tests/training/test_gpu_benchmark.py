"""The parts of benchmarks/gpu.py, at a tiny size on the CPU."""

import json

import pytest

from benchmarks import gpu
from benchmarks.gpu import Size, main

TINY = "2x32x300x16x4"


def test_a_record_has_every_contender_at_every_size(tmp_path, capsys) -> None:
    output = tmp_path / "gpu.json"
    words = [f"sizes={TINY},2x32x300x8x8", "contenders=ours,nanogpt,gpt2", f"memory={TINY}", "square=64"]
    main([f"output={output}", "device=cpu", "row_seconds=0.1", *words])
    record = json.loads(output.read_text())
    rows = record["rows"]
    assert {(row["contender"], row["context"]) for row in rows} == {
        (name, context) for name in ("ours", "nanogpt", "gpt2") for context in (8, 16)
    }
    assert all(row["steps"] >= gpu.STEPS_BETWEEN_LOOKS and row["tokens_per_second"] > 0 for row in rows)
    assert [row["contender"] for row in rows if row.get("probe_share_every_100_steps", 0) > 0] == ["ours", "ours"]
    peak = record["matmul_flops_per_second"]
    flops = [row["share_of_matmul_peak"] * peak / row["tokens_per_second"] for row in rows]
    assert flops == pytest.approx(
        [6 * (row["parameters"] - row["context"] * 32) + 12 * 2 * 32 * row["context"] for row in rows]
    )
    (memory,) = record["memory"]
    assert memory["peak_bytes"] is None
    assert memory["estimated_bytes"] > 12 * rows[0]["parameters"]
    assert record["machine"]["device"] == "cpu"


def test_what_cannot_be_timed_is_named() -> None:
    options = gpu.DEFAULTS | {"sizes": TINY, "memory": "", "square": "64", "seconds": "-1"}
    record = gpu.time_steps(options, ["ours"], gpu.torch.device("cpu"))
    assert (record["rows"], record["left_out"]) == ([], [f"ours at {Size.read(TINY)}"])
    with pytest.raises(SystemExit, match="there is no GPU that torch can use"):
        main([])
    with pytest.raises(SystemExit, match="unknown contender theirs; allowed: ours"):
        main(["device=cpu", "contenders=ours,theirs"])


@pytest.mark.slow
def test_runs_of_a_study_are_counted(tiny: list[str], cache) -> None:
    result = gpu.time_study(2, 300, [*tiny[1:], f"cache_dir={cache}"])
    assert (result["runs"], result["workers"], result["over"], result["status"]) == (4, 2, 4, 0)
    assert result["fewest_tokens"] == result["most_tokens"] == 6 * 8 * 16
