"""What a probe costs: one table from one run, ratios and peak memory.

    python benchmarks/entropy.py                      # all rows, about an hour on two cores
    python benchmarks/entropy.py quick=true           # GPT-2's width with 2 layers at T = 128 and 2048, a minute or two
    python benchmarks/entropy.py output=results/benchmarks/entropy.json

Contenders, each on the same random weights and tokens, without the output layer:
  plain   the model's own sdpa forward pass
  probe   the same inside EntropyProbe
  eager   output_attentions=True in eager attention and -sum p ln p (measured up to T = 4096, computed beyond)
Times are taken in turns within one process, so that a busy machine hurts all alike; the ratio is the median over
turns. Peak memory is taken in a process of its own per contender: the high-water mark above the loaded model
(Linux). `call` is the attention call alone: the explicit formula against attention_entropy.

Other keys: models=gpt2,pythia-70m,llama-gqa contexts=128,512,2048 dtype=fp32|bf16 threads=1 turns=5
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from records import read_options, refuse_unknown, write_record

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2-2-layers": {"type": "gpt2", "n_layer": 2, "n_embd": 768, "n_head": 12},
    "pythia-70m": {
        "type": "gpt_neox",
        "num_hidden_layers": 6,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    },
    "llama-gqa": {
        "type": "llama",
        "num_hidden_layers": 8,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
    },
}
DEFAULTS = {
    "models": "gpt2,pythia-70m,llama-gqa",
    "contexts": "128,512,1024,2048,4096,8192",
    "dtype": "fp32",
    "threads": "1",
    "turns": "5",
    "quick": "false",
    "output": "",
    "job": "",
}
LARGEST_EAGER_CONTEXT = 4096
TOKENS = 2048
"""Tokens of a forward pass: short contexts are batched up to this many."""


def main(arguments: list[str]) -> None:
    """Run every row, print the table, and write it as JSON if asked."""
    options = read_options(arguments, DEFAULTS)
    refuse_unknown("model", options["models"].split(","), allowed=SHAPES)
    if options["job"]:
        print(json.dumps(run_job(json.loads(options["job"]))))
        return
    if options["quick"] == "true":
        options |= {"models": "gpt2-2-layers", "contexts": "128,2048", "turns": "3"}
    rows = []
    for model in options["models"].split(","):
        for context in map(int, options["contexts"].split(",")):
            rows.append(measure_row(model, context, options))
            print_row(rows[-1], header=len(rows) == 1)
    write_record(options["output"], options, {"rows": rows})


def measure_row(model: str, context: int, options: dict[str, str]) -> dict[str, Any]:
    """One line of the table, from four processes."""
    batch = max(1, TOKENS // context)
    job = {"model": model, "context": context, "batch": batch}
    job |= {"dtype": options["dtype"], "threads": int(options["threads"]), "turns": int(options["turns"])}
    eager = context <= LARGEST_EAGER_CONTEXT
    row = job | in_a_process(job | {"task": "times", "eager": eager})
    for contender in ("plain", "probe", "eager") if eager else ("plain", "probe"):
        row[f"{contender}_bytes"] = in_a_process(job | {"task": "memory", "contender": contender})["bytes"]
    if not eager:
        shape = SHAPES[model]
        layers = shape["n_layer" if "n_layer" in shape else "num_hidden_layers"]
        heads = shape["n_head" if "n_head" in shape else "num_attention_heads"]
        row["eager_bytes_computed"] = layers * batch * heads * context**2 * (4 if options["dtype"] == "fp32" else 2)
    return row


def in_a_process(job: dict[str, Any], script: str = __file__, **variables: str) -> dict[str, Any]:
    """Run one job of a script in a fresh interpreter, so that no contender sees another's memory."""
    command = [sys.executable, script, f"job={json.dumps(job)}"]
    answer = subprocess.run(command, env=os.environ | variables, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """The work of one process."""
    import torch

    torch.set_num_threads(job["threads"])
    if job["task"] == "memory":
        run = contender(job["contender"], job)
        before = start_memory_watch()
        run()
        return {"bytes": peak_memory() - before}
    names = ["plain", "probe", *(["eager"] if job["eager"] else [])]
    runs = {name: contender(name, job) for name in names}
    runs |= attention_calls(job) if job["eager"] else {}
    seconds = take_turns(runs, job["turns"])
    times: dict[str, Any] = {f"{name}_seconds": statistics.median(each) for name, each in seconds.items()}
    times["probe_over_plain"] = ratio(seconds["probe"], seconds["plain"])
    if job["eager"]:
        times["eager_over_probe"] = ratio(seconds["eager"], seconds["probe"])
        times["call_explicit_over_ours"] = ratio(seconds["call_explicit"], seconds["call_ours"])
    return times


def contender(name: str, job: dict[str, Any]) -> Callable[[], object]:
    """A function that runs one forward pass the contender's way."""
    import torch

    from normfree.entropy import EntropyProbe

    model = random_model(job["model"], job["context"], attention="eager" if name == "eager" else "sdpa")
    model = model.to(torch.bfloat16) if job["dtype"] == "bf16" else model
    ids = torch.randint(0, 1024, (job["batch"], job["context"]))

    def plain() -> object:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False)

    def probe() -> object:
        with EntropyProbe(model) as heads, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return heads.statistics().mean_nats()

    def eager() -> object:
        with torch.no_grad():
            attentions = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
            return [-(p * p.clamp_min(1e-12).log()).sum(-1).mean((0, 2)) for p in attentions]

    return {"plain": plain, "probe": probe, "eager": eager}[name]


def random_model(shape: str, context: int, attention: str = "sdpa") -> Any:
    """A model of one of `SHAPES` without output layer, with random weights from seed 0."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, logging

    logging.set_verbosity_error()
    settings: dict[str, Any] = SHAPES[shape] | {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0}
    family = settings.pop("type")
    settings["n_positions" if family == "gpt2" else "max_position_embeddings"] = context
    torch.manual_seed(0)
    return AutoModel.from_config(CONFIG_MAPPING[family](**settings), attn_implementation=attention).eval()


def attention_calls(job: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """The attention call alone: entropy from the explicit matrix, and ours."""
    import torch

    from normfree.entropy import attention_entropy

    q, k = torch.randn(2, job["batch"], 12, job["context"], 64)
    hidden = torch.ones(job["context"], job["context"], dtype=torch.bool).triu(1)

    def explicit() -> object:
        p = (q @ k.mT * 0.125).masked_fill(hidden, -torch.inf).softmax(-1)
        return -(p * p.clamp_min(1e-12).log()).sum(-1)

    return {"call_explicit": explicit, "call_ours": lambda: attention_entropy(q, k, causal=True)}


def take_turns(
    runs: dict[str, Callable[[], object]], turns: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every run in every turn, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Median over turns of the ratio within a turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def start_memory_watch() -> int:
    """Reset the process's high-water mark; returns the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_memory() -> int:
    """High-water mark of resident bytes since the watch began."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def print_row(row: dict[str, Any], *, header: bool) -> None:
    """One line of the table."""
    if header:
        print(
            "model          T     B  plain s  probe s  probe/plain  eager/probe  call  MB above load: plain probe eager"
        )
    eager, call = row.get("eager_over_probe"), row.get("call_explicit_over_ours")
    times = f"{row['plain_seconds']:8.3f} {row['probe_seconds']:8.3f} {row['probe_over_plain']:12.2f}"
    ratios = f"{'-' if eager is None else f'{eager:.1f}':>12} {'-' if call is None else f'{call:.1f}':>5}"
    memory = f"{row['plain_bytes'] / 1e6:20.0f} {row['probe_bytes'] / 1e6:5.0f}"
    most = (
        f"{row['eager_bytes'] / 1e6:.0f}"
        if "eager_bytes" in row
        else f"{row['eager_bytes_computed'] / 1e6:.0f} computed"
    )
    print(f"{row['model']:13} {row['context']:5} {row['batch']:3} {times} {ratios} {memory} {most}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
