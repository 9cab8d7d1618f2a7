"""What measures cost: in a training run, and beside a plain forward pass of a long text.

    python benchmarks/measures.py                     # both tables, about ten minutes on one core
    python benchmarks/measures.py contexts= turns=9   # the first alone
    python benchmarks/measures.py output=results/benchmarks/measures.json

The first table is of the preset `cpu` (12 x 128, T = 128, 64 held-out sequences): seconds of each measure above a pass
without measures, taken in turns with training steps of 1,024 tokens, and what that is of 250 steps, the preset's
period. `defaults` are all measures of `probe.measures` together with their pass, at the periods that they have there.

Seconds are of the processor, so that what runs beside counts for little.

The second is of `measures=heads,sinks,residual` on random weights of GPT-2's shape without the output layer: the ratio
to its plain sdpa pass, and peak memory above the loaded model, of a process each (Linux).

Other keys: contexts=512,2048,4096,8192 model=gpt2 precision=bf16|fp32 threads=1 turns=5 measures=heads
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from entropy import SHAPES, peak_memory, random_model, ratio, start_memory_watch, take_turns
from records import read_options, refuse_unknown, write_record

DEFAULTS = {
    "contexts": "512,2048,4096,8192",
    "model": "gpt2",
    "measures": "heads,sinks,residual",
    "precision": "bf16",
    "threads": "1",
    "turns": "5",
    "output": "",
    "job": "",
}
STEPS, SEQUENCES = 250, 64
"""Of the preset cpu: steps between measurements, and sequences of one."""

WITHOUT_FRAGMENTS = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""glibc gives freed blocks of 1 MiB and more back at once; else holes in its heap count as memory."""


def main(arguments: list[str]) -> None:
    """Make both tables, print them, and write them as JSON if asked."""
    options = read_options(arguments, DEFAULTS)
    refuse_unknown("model", [options["model"]], allowed=SHAPES)
    warnings.simplefilter("ignore")  # of what a model without names of its own leaves out
    if options["job"]:
        print(json.dumps(run_job(json.loads(options["job"]))))
        return
    job = {name: options[name] for name in ("model", "precision")} | {"names": options["measures"].split(",")}
    job |= {name: int(options[name]) for name in ("threads", "turns")}
    training = in_a_process(job | {"task": "training"})
    print_training(training)
    contexts = [int(context) for context in options["contexts"].split(",") if context]
    rows = [measure_context(context, job) for context in contexts]
    write_record(options["output"], options, {"training": training, "contexts": rows})


def measure_context(context: int, job: dict[str, Any]) -> dict[str, Any]:
    """One line of the second table, from three processes."""
    row = {"context": context} | in_a_process(job | {"task": "times", "context": context})
    for name in ("plain", "measured"):
        memory = in_a_process(job | {"task": "memory", "context": context, "contender": name})
        row[f"{name}_bytes"] = memory["bytes"]
    sizes = " and ".join(f"{row[f'{name}_bytes'] / 1e6:,.0f}" for name in ("plain", "measured"))
    print(f"T = {context}: {row['over_plain']:.2f} x the plain pass; {sizes} MB", flush=True)
    return row


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a fresh interpreter, so that none sees another's memory."""
    command = [sys.executable, __file__, f"job={json.dumps(job)}"]
    answer = subprocess.run(command, env=os.environ | WITHOUT_FRAGMENTS, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """The work of one process."""
    import torch

    torch.set_num_threads(job["threads"])
    if job["task"] == "training":
        return time_training(job["precision"], job["turns"])
    runs = contenders(job["model"], job["context"], job["names"])
    if job["task"] == "memory":
        before = start_memory_watch()
        runs[job["contender"]]()
        return {"bytes": peak_memory() - before}
    seconds = take_turns(runs, job["turns"], time.process_time)
    return {"over_plain": ratio(seconds["measured"], seconds["plain"])} | {
        f"{name}_seconds": statistics.median(times) for name, times in seconds.items()
    }


def contenders(shape: str, context: int, names: list[str]) -> dict[str, Callable[[], object]]:
    """A forward pass of one text without and with the measures."""
    import torch

    from normfree.measures.measurement import measure

    model = random_model(shape, context)
    ids_BT = torch.randint(0, 1024, (1, context))

    def plain() -> object:
        with torch.no_grad():
            return model(input_ids=ids_BT, use_cache=False)

    return {"plain": plain, "measured": partial(measure, model, ids_BT, names)}


def time_training(precision: str, turns: int) -> dict[str, Any]:
    """Seconds of a step, of a pass without measures and of each measure above it; percent of 250 steps for each."""
    import torch
    from contenders import Job, ours

    from normfree.measures import MEASURES, open_measures, periods_of
    from normfree.measures.held_out import blocks_of, measure_batches
    from normfree.measures.measure import values_of
    from normfree.spec.run import ProbeSpec
    from normfree.training.processes import keep_freed_memory

    keep_freed_memory()  # as `normfree train` does
    torch.manual_seed(0)
    model, loss_of = ours(Job("ours", 12, 128, 4096, 128, 8, 1, keep_memory=True), bias="qk")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    ids_BT, blocks_NT = torch.randint(0, 4096, (8, 128)), torch.randint(0, 4096, (SEQUENCES, 128))
    classes_V = torch.randint(0, 8, (4096,))
    in_precision = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        model.train()
        with in_precision():
            loss = loss_of(ids_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def plain() -> None:
        measure_batches(model, blocks_of(model, blocks_NT, 8), [])

    def measured(*names: str) -> None:
        measures = open_measures(names, model, selectivity={"classes": classes_V})
        measure_batches(model, blocks_of(model, blocks_NT, 8, measures), measures)
        values_of(measures)

    periods = periods_of(ProbeSpec().measures, STEPS)
    often = [name for name, every in periods.items() if every == STEPS]
    rare = [name for name in periods if name not in often]
    runs: dict[str, Callable[[], object]] = {"step": step, "plain": plain}
    runs |= {name: partial(measured, name) for name, kind in MEASURES.items() if not kind.needs_training}
    runs |= {"often": partial(measured, *often), "rare": partial(measured, *rare)}
    with in_precision():
        seconds = take_turns(runs, turns, time.process_time)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    period = STEPS * median["step"]
    above = {name: median[name] - median["plain"] for name in MEASURES if name in runs}
    every = periods[rare[0]] // STEPS
    return {
        "seconds": {name: median[name] for name in ("step", "plain", "often", "rare")} | above,
        "percent": {name: 100 * value / period for name, value in above.items()}
        | {"plain": 100 * median["plain"] / period},
        "defaults_percent": 100 * (median["often"] + median["rare"] / every) / period,
    }


def print_training(training: dict[str, Any]) -> None:
    """The first table."""
    seconds, percent = training["seconds"], training["percent"]
    print(f"a step {1000 * seconds['step']:.0f} ms; {STEPS} steps {STEPS * seconds['step']:.1f} s")
    for name, share in percent.items():
        print(f"{name:12} {seconds[name]:7.3f} s {share:6.2f} %")
    print(f"{'defaults':12} {seconds['often']:7.3f} s {training['defaults_percent']:6.2f} %", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
