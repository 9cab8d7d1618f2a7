"""What choices of norm, activation and objective cost: bytes kept for the backward pass, and time of a step.

    python benchmarks/choices.py output=results/benchmarks/choices.json    # about six minutes on two cores

Bytes kept are what autograd saves per token, layer and channel: the difference between models of three and two layers,
each storage counted once, parameters left out; T = 1024, so that attention is fused. `autocast` is how the package
trains in bf16 (fp32 weights and residual stream), `weights` a model in bf16 throughout.

Step times are medians over turns of the ratio to the reference within a turn, forward and backward pass with AdamW:
`entropy` adds the entropies of all heads to the loss. Other keys: turns=7 threads=1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from records import read_options, write_record
from torch import nn

from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.training.precision import products_for

DEFAULTS = {"turns": "7", "threads": "1", "output": ""}
VARIANTS = {
    f"SM{norm}+{letter}": {"norm": name, "activation": activation}
    for norm, name in (("+LN", "layernorm"), ("+RMS", "rmsnorm"), ("+DyT", "dyt"), ("", "none"))
    for letter, activation in (("G", "gelu"), ("R", "relu"))
}
SHAPES = {
    "128 wide, T = 128": {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 12, "tokens": 128},
    "768 wide, T = 2048": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 2, "tokens": 2048},
}


def main(arguments: list[str]) -> None:
    """Measure, print and write JSON if asked."""
    options = read_options(arguments, DEFAULTS)
    torch.set_num_threads(int(options["threads"]))
    record: dict[str, Any] = {"kept_bytes": {}, "step_ratios": {}}
    for name, fields in VARIANTS.items():
        kept = {form: kept_bytes(fields, form) for form in ("autocast", "weights")}
        record["kept_bytes"][name] = kept
        print(f"{name:10} bytes kept a token, layer and channel: {kept}", flush=True)
    for shape, sizes in SHAPES.items():
        seconds = step_seconds(sizes, turns=int(options["turns"]))
        reference = seconds["SM+G"]
        ratios = {name: statistics.median(map(ratio, values, reference)) for name, values in seconds.items()}
        record["step_ratios"][shape] = {name: round(value, 3) for name, value in ratios.items()}
        print(f"{shape}: SM+G {statistics.median(reference):.3f} s; {record['step_ratios'][shape]}", flush=True)
    write_record(options["output"], options, record)


def ratio(value: float, reference: float) -> float:
    """One turn's step time in units of the reference's."""
    return value / reference


def kept_bytes(fields: dict[str, Any], form: str) -> float:
    """Bytes that autograd saves per token, layer and channel."""
    width, tokens = 256, 1024
    totals = []
    for layers in (2, 3):
        sizes = {"hidden_size": width, "num_attention_heads": 4, "num_hidden_layers": layers, "vocab_size": 512}
        config = NormFreeConfig(**sizes, max_position_embeddings=tokens, **fields)
        model = NormFreeForCausalLM._from_config(config, attn_implementation="sdpa").train()
        if form == "weights":
            model = model.to(torch.bfloat16)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, own: set[int] = own, saved: dict[int, int] = saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tensor.numel() >= tokens * width:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.randint(0, 512, (1, tokens))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast")
        with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.model(ids)  # alive: freed storages would be counted under another's address
            totals.append(sum(saved.values()))
        del output
    return round((totals[1] - totals[0]) / (tokens * width), 1)


def step_seconds(sizes: dict[str, int], *, turns: int) -> dict[str, list[float]]:
    """Seconds of a step of each contender, in turns; the batch is 1,024 tokens, or one sequence of a longer T."""
    fields = {name: value for name, value in sizes.items() if name != "tokens"}
    tokens = sizes["tokens"]
    ids = torch.randint(0, 4096, (max(1, 1024 // tokens), tokens))
    contenders: dict[str, Callable[[], None]] = {}
    for name, chosen in (VARIANTS | {"SM+G, entropy": VARIANTS["SM+G"]}).items():
        config = NormFreeConfig(**fields, vocab_size=4096, max_position_embeddings=tokens, **chosen)
        contenders[name] = stepper(NormFreeForCausalLM(config).train(), ids, entropy="entropy" in name)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with products_for("bf16", torch.device("cpu")):
        for turn in range(turns + 1):
            for name, step in contenders.items():
                start = time.perf_counter()
                step()
                if turn:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def stepper(model: NormFreeForCausalLM, ids: torch.Tensor, *, entropy: bool) -> Callable[[], None]:
    """A function that makes one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    layers = tuple(range(model.config.num_hidden_layers)) if entropy else ()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(ids, labels=ids, return_logits=False, entropy_layers=layers)
        loss = output.loss + output.head_entropies.mean() if entropy else output.loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
