"""What a training step costs: tokens per second, peak memory and utilisation beside the peers, from one run.

    python benchmarks/training.py                     # 12 layers x 128 and 256; about eleven minutes on two cores
    python benchmarks/training.py full=true           # 192, 768, vocabulary 50257 and T = 256 too; an hour
    python benchmarks/training.py whole=true          # also `normfree train` against our bare step; three minutes more
    python benchmarks/training.py output=results/benchmarks/training.json

One process per contender. Ours stays alive for a whole size and takes turns with one peer after the other; the ratio
is the median over turns of (our tokens per second / theirs) within a turn. A peer runs twice: with glibc's allocator as
it comes, and with the setting that our commands make (`kept`). Contenders are described in benchmarks/contenders.py.

Utilisation is FLOPs a token x tokens per second over the matmul peak of bf16 measured in the same run (4096^3), with
FLOPs a token = 6 N + 12 L d T and N all parameters but the positions. Peak memory is the process's high-water mark
above what it held once the libraries were loaded: weights, gradients, Adam's moments and activations (Linux).
`ours 2 processes` is DistributedDataParallel over gloo with half of the sequences and threads in each, its peak memory
that of both.

Other keys: contenders=gpt2,nanogpt reference='ours fp32' sizes=128x4096 threads=2 turns=3; `reference` is who takes
turns with every contender.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from entropy import peak_memory, start_memory_watch
from records import read_options, refuse_unknown, write_record

LAYERS = 12
QUICK_SIZES = "128x4096,256x8192"
FULL_SIZES = "128x4096,192x4096,256x8192,128x50257,768x50257,128x4096x256,256x8192x256"
DEFAULTS = {
    "sizes": "",
    "contenders": "",
    "reference": "ours",
    "threads": "2",
    "turns": "3",
    "full": "false",
    "whole": "false",
    "output": "",
    "worker": "",
}
TOKENS = 4096
TWO_PROCESSES = "ours 2 processes"
SQUARE = 4096


def main(arguments: list[str]) -> None:
    """Measure, print one table a size, and write JSON if asked."""
    options = completed(read_options(arguments, DEFAULTS))
    if options["worker"]:
        work(json.loads(options["worker"]))
        return
    record: dict[str, Any] = {}
    record["matmul_flops_per_second"] = peaks = ask_for_peaks(int(options["threads"]))
    for dtype, peak in peaks.items():
        print(f"matmul {SQUARE}^3, {dtype}: {peak / 1e12:.3f} TFLOP/s")
    record["rows"] = []
    if options["whole"] == "true":
        record["whole"] = measure_whole_training(int(options["threads"]))
        print("normfree train:", json.dumps(record["whole"]), flush=True)
    for size in options["sizes"].split(","):
        rows = measure_size(size, options, peaks["bf16"])
        print_table(size, rows)
        record["rows"] += rows
    write_record(options["output"], options, record)


def completed(options: dict[str, str]) -> dict[str, str]:
    """Sizes and contenders for those that were left open; refuses unknown contenders."""
    from contenders import NAMES

    options["sizes"] = options["sizes"] or (FULL_SIZES if options["full"] == "true" else QUICK_SIZES)
    options["contenders"] = options["contenders"] or ",".join(name for name in NAMES if name != options["reference"])
    refuse_unknown("contender", [options["reference"], *options["contenders"].split(",")], allowed=NAMES)
    return options


class Worker:
    """A process that holds one contender and runs steps when told."""

    def __init__(self, job: dict[str, Any]) -> None:
        command = [sys.executable, __file__, f"worker={json.dumps(job)}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.facts = self._ask("facts")

    def step_seconds(self, steps: int = 1) -> float:
        """Mean seconds of so many steps."""
        return self._ask(f"steps {steps}") / steps

    def probe_seconds(self) -> float:
        """Seconds of one measurement of every head over 64 sequences."""
        return self._ask("probe")

    def peak_bytes(self) -> int:
        """High-water mark above what the loaded libraries held."""
        return self._ask("peak")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, question: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"a contender ended with status {self._process.wait()}: {self._process.args}")


def measure_size(size: str, options: dict[str, str], peak: float) -> list[dict[str, Any]]:
    """Ours against every other contender at one size: WIDTHxVOCABULARY, or WIDTHxVOCABULARYxCONTEXT."""
    width, vocabulary, *context = map(int, size.split("x"))
    tokens = context[0] if context else 128
    job = {"layers": LAYERS, "width": width, "vocabulary": vocabulary, "context": tokens}
    job |= {"batch": TOKENS // tokens, "threads": int(options["threads"])}
    turns = int(options["turns"])
    mine = Worker(job | {"contender": options["reference"], "keep_memory": True})
    warm_up(mine)
    rows, of_mine = [], []
    for name in options["contenders"].split(","):
        for kept in (True,) if name.startswith("ours") else (False, True):
            theirs = Worker(job | {"contender": name, "keep_memory": kept} | processes_of(name, job["threads"]))
            began = time.perf_counter()
            warm_up(theirs)
            warm_up_seconds = time.perf_counter() - began
            pairs = [(mine.step_seconds(), theirs.step_seconds()) for _ in range(turns)]
            of_mine += [ours for ours, _ in pairs]
            row = row_of(job, name, kept, [them for _, them in pairs], theirs, peak)
            row["warm_up_seconds"] = warm_up_seconds
            row["ours_over_theirs"] = statistics.median(them / ours for ours, them in pairs)
            rows.append(row)
            theirs.close()
    first = row_of(job, options["reference"], True, of_mine, mine, peak)
    mine.probe_seconds()
    first["probe_share_every_100_steps"] = mine.probe_seconds() / (100 * statistics.median(of_mine))
    mine.close()
    return [first, *rows]


def processes_of(name: str, threads: int) -> dict[str, Any]:
    """What a contender of several processes needs beyond a size: they share the threads."""
    if name != TWO_PROCESSES:
        return {}
    meeting = str(Path(tempfile.mkdtemp()) / "meeting")
    return {"processes": 2, "meeting": meeting, "threads": max(1, threads // 2)}


def warm_up(worker: Worker) -> None:
    """Two steps: Adam's moments are there after the first."""
    worker.step_seconds(2)


def row_of(
    job: dict[str, Any], name: str, kept: bool, seconds: list[float], worker: Worker, peak: float
) -> dict[str, Any]:
    """What one contender reached."""
    step_seconds = statistics.median(seconds)
    tokens_per_second = job["batch"] * job["context"] / step_seconds
    return {
        **job,
        "contender": name,
        "keep_memory": kept,
        "parameters": worker.facts["parameters"],
        "step_seconds": step_seconds,
        "tokens_per_second": tokens_per_second,
        "utilisation_of_bf16_peak": tokens_per_second * worker.facts["flops_per_token"] / peak,
        "peak_bytes": worker.peak_bytes(),
    }


def print_table(size: str, rows: list[dict[str, Any]]) -> None:
    """One line a contender."""
    print(f"\n{LAYERS} layers x {size}, {TOKENS} tokens a step, {rows[0]['threads']} threads")
    print(f"{'contender':24} {'memory':8} {'tokens/s':>9} {'ours/theirs':>12} {'peak MB':>8} {'utilisation':>12}")
    for row in rows:
        ratio = f"{row['ours_over_theirs']:.2f}" if "ours_over_theirs" in row else "-"
        print(
            f"{row['contender']:24} {'kept' if row['keep_memory'] else 'returned':8} {row['tokens_per_second']:9.0f} "
            f"{ratio:>12} {row['peak_bytes'] / 1e6:8.0f} {100 * row['utilisation_of_bf16_peak']:10.1f} %",
            flush=True,
        )
    print(f"a probe every 100 steps: {100 * rows[0]['probe_share_every_100_steps']:.2f} % of the time", flush=True)


def measure_whole_training(threads: int) -> dict[str, float]:
    """`normfree train` at the cpu preset against our bare step (SM+R), taking turns every ten seconds.

    1000 steps of the run, from the logged step 50 to 1050, hold the preset's logs, four probes, one evaluation and one
    checkpoint; start, final evaluation and saving of the model are outside. The run is stopped while the bare step
    is timed, so that both meet the same moods of a shared machine.
    """
    job = {"layers": LAYERS, "width": 128, "vocabulary": 4096, "context": 128, "batch": 8, "threads": threads}
    bare = Worker(job | {"contender": "ours norm-free", "keep_memory": True})
    warm_up(bare)
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "normfree", "train", "preset=cpu", "variant=sm-r", "train.steps=1100"]
        command += ["train.precision=bf16", f"train.threads={threads}", f"runs_dir={runs}"]
        metrics = Path(runs) / "single" / "sm-r-seed0" / "metrics.jsonl"
        training = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            if not wait_for_step(50, metrics, training):
                raise SystemExit("normfree train did not reach step 50 within ten minutes")
            bare_seconds, trained_seconds = [], 0.0
            while True:
                began = time.perf_counter()
                done = wait_for_step(1050, metrics, training, timeout=10)
                trained_seconds += time.perf_counter() - began
                if done:
                    break
                training.send_signal(signal.SIGSTOP)
                bare_seconds.append(bare.step_seconds(20))
                training.send_signal(signal.SIGCONT)
        finally:
            training.kill()
            training.wait()
            bare.close()
    if not bare_seconds:
        raise SystemExit("1000 steps took less than ten seconds: too fast for this measurement")
    bare_step = statistics.mean(bare_seconds)
    return {
        "step_seconds": trained_seconds / 1000,
        "bare_step_seconds": bare_step,
        "turns": len(bare_seconds),
        "share_of_bare_speed": bare_step / (trained_seconds / 1000),
    }


def wait_for_step(step: int, metrics: Path, training: subprocess.Popen[bytes], timeout: float = 600.0) -> bool:
    """Whether the run has logged `step` within so many seconds; SystemExit if it ended before."""
    until = time.perf_counter() + timeout
    while time.perf_counter() < until:
        if metrics.exists() and f'"step": {step}, "split": "train"' in metrics.read_text():
            return True
        if training.poll() is not None:
            raise SystemExit(f"normfree train ended with status {training.returncode} before step {step}")
        time.sleep(0.05)
    return False


def ask_for_peaks(threads: int) -> dict[str, float]:
    """FLOP/s of a 4096^3 matrix product per dtype, in a process of its own."""
    worker = Worker({"contender": "peaks", "threads": threads, "keep_memory": True})
    worker.close()
    return worker.facts


def work(job: dict[str, Any]) -> None:
    """The worker's side: answer questions from standard input until it is killed."""
    import torch
    from contenders import TRAINER, Job, steps, train_with_trainer

    from normfree.training.processes import keep_freed_memory

    if job["keep_memory"]:
        keep_freed_memory()
    torch.set_num_threads(job["threads"])
    if job["contender"] == "peaks":
        input()
        answer(
            {dtype: matmul_peak(getattr(torch, name)) for dtype, name in (("fp32", "float32"), ("bf16", "bfloat16"))}
        )
        return
    one = Job(**job)
    before = start_memory_watch()
    questions = Questions(one, before)
    if one.processes > 1 and one.rank == 0:
        for rank in range(1, one.processes):  # they end when the first process is gone
            subprocess.Popen(
                [sys.executable, __file__, f"worker={json.dumps(job | {'rank': rank})}"], stdout=sys.stderr
            )
    if one.rank > 0:
        for _ in steps(one):
            pass  # the average of the gradients waits for the first process
    if one.contender == TRAINER:
        train_with_trainer(one, questions.wait)
        return
    for model in steps(one):
        questions.wait(model)


class Questions:
    """Answers the parent between steps; returns when a step is due."""

    def __init__(self, job: Any, before: int) -> None:
        self.job, self.before = job, before
        self.due, self.asked, self.began = 0, 0, 0.0

    def wait(self, model: Any) -> None:
        """Called once a step: with all asked steps done, answer and take the next questions."""
        if self.due == 0 and self.asked:
            answer(time.perf_counter() - self.began)
            self.asked = 0
        while self.due == 0:
            match input().split():
                case ["facts"]:
                    answer(facts(model, self.job))
                case ["peak"]:
                    answer((peak_memory() - self.before) * self.job.processes)
                case ["probe"]:
                    answer(probe_seconds(model, self.job))
                case ["steps", count]:
                    self.due = self.asked = int(count)
                    self.began = time.perf_counter()
        self.due -= 1


def facts(model: Any, job: Any) -> dict[str, float]:
    """Parameters and FLOPs a token, 6 N + 12 L d T with N all parameters but the positions."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    counted = parameters - job.context * job.width
    flops = 6 * counted + 12 * job.layers * job.width * job.context
    return {"parameters": parameters, "flops_per_token": flops}


def probe_seconds(model: Any, job: Any) -> float:
    """One measurement of every head over 64 sequences, as the training callback makes it."""
    import torch

    from normfree import measure

    blocks_NT = torch.randint(0, job.vocabulary, (64, job.context))
    began = time.perf_counter()
    measure(model, blocks_NT, ["heads", "slopes"], batch=job.batch)
    return time.perf_counter() - began


def matmul_peak(dtype: Any, size: int = SQUARE) -> float:
    """FLOP/s of the best of three square products."""
    import torch

    left, right = torch.randn(2, size, size).to(dtype)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])


def answer(value: Any) -> None:
    """One line to the parent."""
    print("answer " + json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
