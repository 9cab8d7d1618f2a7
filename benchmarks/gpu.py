"""Training on one GPU: tokens per second, share of the matmul peak and memory, ours beside peers.

    python -m benchmarks.gpu output=results/benchmarks/gpu.json                  # at most six minutes
    python -m benchmarks.gpu study=20 output=results/benchmarks/gpu-study.json   # 20 runs at once; at most five

Not measured yet: written on machines without a GPU, its parts tested on the CPU (tests/training/test_gpu_benchmark.py).

The first command times steps of 32,768 tokens at 12 x 768 (125 M parameters), T = 1024 and 128, in bf16: forward,
backward, clipping and fused AdamW, for `row_seconds` after a warm-up, which compiles. After `seconds` no contender
begins, and the record names those left out. The matmul peak is that of 8192^3 in the same process. `memory` compares
peaks with `normfree estimate` at 125 M and 350 M.

The second starts `normfree study` with as many runs and workers: the cpu preset (12 x 128, T = 128) in bf16. After
`limit` seconds it stops them and records how far they came. Start NVIDIA's MPS before (`nvidia-cuda-mps-control -d`).

Other keys: seconds=290 row_seconds=10 device=cuda square=8192; words='train.steps=100 ...' for the study's runs; for a
trial on the CPU device=cpu sizes=2x32x300x16x4 memory=2x32x300x16x4 contenders=ours square=64.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.contenders import CONTENDERS, HEADS, Job
from benchmarks.records import read_options, refuse_unknown, write_record
from normfree import measure
from normfree.cost.estimate import peak_memory
from normfree.data import prepare
from normfree.spec.compose import compose_run
from normfree.store.runs import OVER, find_runs
from normfree.training.precision import products_for

DEFAULTS = {
    "output": "",
    "device": "cuda",
    "seconds": "290",
    "row_seconds": "10",
    "sizes": "12x768x50257x1024x32,12x768x50257x128x256",
    "contenders": "ours compiled,nanogpt compiled,ours,ours norm-free compiled,gpt2,nanogpt",
    "square": "8192",
    "memory": "12x768x50257x1024x16,24x1024x50257x1024x16",
    "study": "",
    "limit": "300",
    "words": "",
}
STEPS_BETWEEN_LOOKS = 4
"""Steps between two looks at the clock, each of which waits for the device."""


class Size(NamedTuple):
    """A model and the sequences of a step."""

    layers: int
    width: int
    vocabulary: int
    context: int
    batch: int

    @classmethod
    def read(cls, text: str) -> Size:
        """From LAYERSxWIDTHxVOCABULARYxCONTEXTxBATCH."""
        return cls(*map(int, text.split("x")))

    @property
    def tokens(self) -> int:
        return self.context * self.batch

    def job(self, contender: str) -> Job:
        """The job of a contender at this size."""
        return Job(contender=contender, **self._asdict(), threads=1, keep_memory=False)


def main(arguments: list[str]) -> None:
    """Measure one of both, print it and write JSON if asked."""
    options = read_options(arguments, DEFAULTS)
    device = torch.device(options["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use: benchmarks/training.py measures on the CPU")
    machine = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    if options["study"]:
        record = {"study": time_study(int(options["study"]), float(options["limit"]), options["words"].split())}
        print(json.dumps(record, indent=1))
    else:
        names = options["contenders"].split(",")
        refuse_unknown("contender", {name.removesuffix(" compiled") for name in names}, allowed=CONTENDERS)
        record = time_steps(options, names, device)
    write_record(options["output"], options, record, machine)


def time_steps(options: dict[str, str], names: list[str], device: torch.device) -> dict[str, Any]:
    """Every contender at every size, within the time."""
    ends = time.monotonic() + float(options["seconds"])
    peak = matmul_peak(int(options["square"]), device)
    print(f"matmul {options['square']}^3, bf16: {peak / 1e12:.1f} TFLOP/s", flush=True)
    record: dict[str, Any] = {"matmul_flops_per_second": peak, "rows": [], "left_out": []}
    record["memory"] = [compare_memory(Size.read(text), device) for text in options["memory"].split(",") if text]
    print(*record["memory"], sep="\n", flush=True)
    for size, name in [(Size.read(text), name) for name in names for text in options["sizes"].split(",")]:
        if time.monotonic() > ends:
            record["left_out"].append(f"{name} at {size}")
            continue
        try:
            row = time_contender(size, name, float(options["row_seconds"]), peak, device)
        except torch.OutOfMemoryError:
            row = {"contender": name, **size._asdict(), "out_of_memory": True}
        record["rows"].append(row)
        print(row, flush=True)
    return record


def time_contender(size: Size, name: str, seconds: float, peak: float, device: torch.device) -> dict[str, Any]:
    """Steps of one contender for so many seconds after its warm-up, at least a few."""
    begins = time.monotonic()
    stepper = Stepper(size, name, device)
    for _ in range(3):  # compiles; AdamW's moments exist after the first
        stepper.step()
    wait_for(device)
    warm_up = time.monotonic() - begins
    steps, began = 0, time.monotonic()
    while not steps or time.monotonic() - began < seconds:
        for _ in range(STEPS_BETWEEN_LOOKS):
            stepper.step()
        wait_for(device)
        steps += STEPS_BETWEEN_LOOKS
    step_seconds = (time.monotonic() - began) / steps
    tokens_per_second = size.tokens / step_seconds
    parameters = sum(parameter.numel() for parameter in stepper.model.parameters())
    flops = 6 * (parameters - size.context * size.width) + 12 * size.layers * size.width * size.context
    row = {
        **{"contender": name, **size._asdict(), "parameters": parameters, "steps": steps},
        **{"warm_up_seconds": warm_up, "tokens_per_second": tokens_per_second, "peak_bytes": peak_bytes(device)},
        "share_of_matmul_peak": tokens_per_second * flops / peak,
    }
    if name == "ours":
        row["probe_share_every_100_steps"] = probe_seconds(stepper.model, size, device) / (100 * step_seconds)
    return row


class Stepper:
    """One contender on the device, and its training step in bf16."""

    def __init__(self, size: Size, name: str, device: torch.device) -> None:
        torch.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.size, self.device = size, device
        build, _ = CONTENDERS[name.removesuffix(" compiled")]
        self.model, self.loss = build(size.job(name))
        self.model.to(device).train()
        if name.endswith("compiled"):
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self) -> None:
        """Forward, backward, clipping, AdamW; never waits for the device."""
        ids_BT = torch.randint(self.size.vocabulary, (self.size.batch, self.size.context), device=self.device)
        with products_for("bf16", self.device), torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss(ids_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()


def probe_seconds(model: Any, size: Size, device: torch.device) -> float:
    """The second of two measurements of every head over 64 sequences, as the training callback makes them."""
    blocks_NT = torch.randint(size.vocabulary, (64, size.context))
    for _ in range(2):
        wait_for(device)
        began = time.monotonic()
        with torch.autocast(device.type, torch.bfloat16):
            measure(model, blocks_NT, ["heads", "slopes"], batch=min(64, size.batch))
    return time.monotonic() - began


def compare_memory(size: Size, device: torch.device) -> dict[str, Any]:
    """Peak bytes of our step (SM+R) against those of `normfree estimate`; the first are None on the CPU."""
    stepper = Stepper(size, "ours norm-free", device)
    for _ in range(2):
        stepper.step()
    wait_for(device)
    words = ["preset=cpu", "variant=sm-r", "train.precision=bf16", f"data.context={size.context}"]
    words += [f"data.vocab_size={size.vocabulary}", f"model.num_attention_heads={HEADS[size.width]}"]
    words += [f"model.num_hidden_layers={size.layers}", f"model.hidden_size={size.width}"]
    words += [f"train.batch_sequences={size.batch}", f"train.micro_batch_sequences={size.batch}"]
    moment, parts = peak_memory(compose_run(words).spec)
    measured, estimated = peak_bytes(device), sum(parts.values())
    ratio = estimated / measured if measured else None
    return {**size._asdict(), "peak_bytes": measured, "estimated_bytes": estimated, "ratio": ratio, "moment": moment}


def peak_bytes(device: torch.device) -> int | None:
    """The most that torch's allocator held on a GPU since the contender began."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def matmul_peak(square: int, device: torch.device) -> float:
    """FLOP/s of a square product in bf16: the best of five rounds of ten."""
    left, right = torch.randn(2, square, square, device=device).bfloat16()
    seconds = []
    for _ in range(6):  # the first warms up
        wait_for(device)
        began = time.monotonic()
        for _ in range(10):
            left @ right
        wait_for(device)
        seconds.append(time.monotonic() - began)
    return 10 * 2 * square**3 / min(seconds[1:])


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_study(count: int, limit: float, words: list[str]) -> dict[str, Any]:
    """`normfree study` of so many runs at once, stopped after `limit` seconds; the corpus is prepared before."""
    job = compose_run(["preset=cpu", *words])
    prepare(job.spec.data, cache=job.cache_dir)
    seeds = list(range(math.ceil(count / 4)))
    groups = [{"variants": ["sm-ln-g", "sm-ln-r", "sm-g", "sm-r"], "seeds": seeds}]
    with tempfile.TemporaryDirectory() as folder:
        file, runs = Path(folder) / "many.yaml", Path(folder) / "runs"
        file.write_text(json.dumps({"preset": "cpu", "set": {"train.precision": "bf16"}, "groups": groups}))
        command = [sys.executable, "-m", "normfree", "study", str(file), f"workers={count}", f"runs_dir={runs}", *words]
        began = time.monotonic()
        study = subprocess.Popen(command)
        try:
            study.wait(limit)
        except subprocess.TimeoutExpired:
            study.send_signal(signal.SIGTERM)
            study.wait()
        seconds = time.monotonic() - began
        trained = find_runs([runs])
    tokens = [run.tokens_seen for run in trained]
    return {
        **{"runs": 4 * len(seeds), "workers": count, "seconds": seconds, "status": study.returncode},
        **{"over": sum(run.status in OVER for run in trained), "fewest_tokens": min(tokens, default=0)},
        **{"most_tokens": max(tokens, default=0), "tokens_per_second": sum(tokens) / seconds},
    }


if __name__ == "__main__":
    main(sys.argv[1:])
