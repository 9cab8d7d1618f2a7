"""Parameters, bytes of memory on each device and time of a training run, from its spec. No torch needed.

The bytes follow one training step in this package: fp32 weights, autocast, the loss in blocks of rows. Tests compare
them with what torch's allocator hands out on the CPU; on a GPU they are not measured.
"""

# B sequences of a pass, T tokens, E width, F feed-forward width, V vocabulary

import math
from dataclasses import dataclass
from typing import Any, Literal

from normfree.cost.families import NORMFREE_DEFAULTS
from normfree.cost.training import SIZES, UTILISATION, config_of, training_flops
from normfree.spec.families import family_of
from normfree.spec.run import RunSpec
from normfree.spec.variants import spread_over_layers
from normfree.store.progress import duration

GIB = 2**30
CONTEXT_BYTES = 1.0 * GIB
"""What a process holds on a GPU beyond torch's tensors: CUDA's context, libraries, gaps. Assumed."""
RING = 2  # blocks that FSDP2 holds gathered at once: the one that computes and the one that is fetched ahead

# The package's constants, repeated here because importing them loads torch; a test compares them.
LOSS_ROWS, LOSS_LOGITS = 1024, {"cpu": 2**24, "gpu": 2**26}
EVALUATION_LOGITS = {"cpu": 2**26, "gpu": 2**28}
LONGEST_WRITTEN_OUT = 512

NORMS = {
    **{"none": (0, 0, 0), "layernorm": (2, 0, 4), "lns": (2, 0, 4), "rmsnorm": (1, 0, 8), "taper": (1, 0, 8)},
    **{"fake": (2, 0, 8), "dyt": (2, 1, 8), "bhyt": (1, 1, 8), "derf": (2, 2, 12)},
}
"""Of one norm: parameters per channel, parameters besides, and the bytes that it keeps for the backward pass, per token
and channel, beside its output, over an fp32 stream."""
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of an element of a product
Device = Literal["cpu", "gpu"]
ACTIVATION_KEEPS = {"relu": 1, "identity": 1, "gelu": 2, "gelu_tanh": 2, "leaky_relu": 2}
"""Tensors of the feed-forward width that an activation and the projection after it keep."""
NOT_COUNTED = ("query_key_norm", "branch", "linear", "attention_temperature", "attention_sink", "attention_gate")
NOT_COUNTED += ("feed_forward", "embedding_scale", "embedding_dropout", "attention_dropout", "residual_dropout")
"""Fields that are reckoned at their default; other values keep more."""

ADVICE = "a smaller train.micro_batch_sequences, train.gradient_checkpointing=true or more GPUs (train.sharding=fsdp)"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU from NVIDIA's data sheets."""

    memory_gib: float  # as torch reports it
    bf16_tflops: float  # dense
    fp32_tflops: float  # without TF32


GPUS = {
    "h100": Gpu(memory_gib=79, bf16_tflops=989, fp32_tflops=67),
    "h200": Gpu(memory_gib=139, bf16_tflops=989, fp32_tflops=67),
    "b200": Gpu(memory_gib=178, bf16_tflops=2250, fp32_tflops=75),
    "a100": Gpu(memory_gib=79, bf16_tflops=312, fp32_tflops=19.5),
    "a100-40gb": Gpu(memory_gib=39, bf16_tflops=312, fp32_tflops=19.5),
    "l40s": Gpu(memory_gib=44, bf16_tflops=362, fp32_tflops=91.6),
    "rtx4090": Gpu(memory_gib=23.5, bf16_tflops=165, fp32_tflops=82.6),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters of a model by place, and sizes of its tensors."""

    block: int  # parameters of one block
    projections: int  # those of them in matrices, which autocast copies
    root: int  # parameters outside the blocks
    layers: int
    width: int
    vocab_size: int
    layer_keeps: float  # bytes that a layer keeps for the backward pass, per token and channel, averaged over layers
    final_norm_keeps: float
    feed_forward: int

    @property
    def parameters(self) -> int:
        return self.block * self.layers + self.root


def sizes_of(spec: RunSpec, device: Device = "gpu") -> Sizes:
    """The sizes of a run's model. Raises ValueError for a size or choice that no model has."""
    model = config_of(spec)
    if model["family"] != "decoder":
        raise ValueError(f"model.family={model['family']}: memory and time are reckoned of decoders only")
    for name in SIZES:
        if (value := model[name]) is not None and not (isinstance(value, int) and value > 0):
            raise ValueError(f"model.{name}={value!r} must be a whole number above 0")
    width, layers = model["hidden_size"], model["num_hidden_layers"]
    feed_forward = model["intermediate_size"] or 4 * width
    sites = 4 if model["placement"] == "peri" else 2
    bias = _chosen(model, "bias", {"none": 0, "qk": 2 * width, "all": 5 * width + feed_forward})
    projections = 4 * width**2 + 2 * width * feed_forward
    activations = spread_over_layers(model["activation"], layers)
    leaky = activations.count("leaky_relu")
    slopes = _chosen(model, "learnable_slope", {"none": 0, "shared": 1, "per_layer": leaky})
    positions = width * model["max_position_embeddings"] * (model["position"] == "learned")
    embeddings = width * model["vocab_size"] * (1 if model["tie_word_embeddings"] else 2)
    norm, final_norm = (NORMS.get(model[name], NORMS["none"]) for name in ("norm", "final_norm"))
    layer_bytes = [_layer_keeps(spec, model, name, sites, device) for name in activations]
    return Sizes(
        block=projections + bias + sites * (norm[0] * width + norm[1]),
        projections=projections,
        root=embeddings + positions + slopes + final_norm[0] * width + final_norm[1],
        layers=layers,
        width=width,
        vocab_size=model["vocab_size"],
        layer_keeps=sum(layer_bytes) / layers,
        final_norm_keeps=final_norm[2],
        feed_forward=feed_forward,
    )


def _chosen(model: dict[str, Any], field: str, numbers: dict[str, int]) -> int:
    if model[field] not in numbers:
        raise ValueError(f"model.{field}={model[field]!r}; allowed: {', '.join(numbers)}")
    return numbers[model[field]]


def _layer_keeps(spec: RunSpec, model: dict[str, Any], activation: str, sites: int, device: Device) -> float:
    """Bytes that autograd keeps of one layer, per token and channel."""
    compute, width, tokens = COMPUTE_BYTES[spec.train.precision], model["hidden_size"], spec.data.context
    # Of attention and of the feed-forward part; parallel fp32 branches without norm read one and the same tensor.
    shared = model["residual"] == "parallel" and model["norm"] == "none" and compute == 4
    inputs = compute * (1 if shared else 2)
    attention = 4 * compute  # queries, keys, values and the output
    if model["position"] == "rotary":
        attention += 3 * compute
    written_out = device == "cpu" and compute == 2 and tokens <= LONGEST_WRITTEN_OUT
    row_bytes = compute * tokens if written_out else 4  # the weights of a row, or the logarithm of their sum
    attention += row_bytes * model["num_attention_heads"] / width
    ratio = (model["intermediate_size"] or 4 * width) / width
    fed = compute * ratio * ACTIVATION_KEEPS.get(activation, 2)
    return inputs + attention + fed + sites * NORMS.get(model["norm"], NORMS["none"])[2]


def peak_memory(spec: RunSpec, *, processes: int = 1, device: Device = "gpu") -> tuple[str, dict[str, float]]:
    """When each device of `processes` holds most, and its bytes then by part. Raises ValueError as `sizes_of`."""
    size, train, compute = sizes_of(spec, device), spec.train, COMPUTE_BYTES[spec.train.precision]
    sharded = train.sharding == "fsdp"
    shards = processes if sharded else 1
    pass_tokens = train.micro_batch_sequences * spec.data.context
    stream = pass_tokens * size.width
    head = size.vocab_size * size.width
    muon = size.projections * size.layers if train.optimizer == "muon" else 0  # one state each, where AdamW has two
    states = {
        "weights": 4 * size.parameters / shards,
        f"states of {train.optimizer}": (8 * size.parameters - 4 * muon) / shards,
    }
    gradients = {"gradients": 4 * size.parameters / shards}
    if processes > 1 and not sharded:
        states["gradients in DDP's buckets"] = 4 * size.parameters
    kept_before = gradients if train.batch_sequences > train.micro_batch_sequences * processes else {}
    copies = 0 if compute == 4 or sharded else 2 * size.projections * size.layers
    if sharded:  # gathered in the dtype of the products
        states["gathered weights"] = 4 * size.root + compute * RING * size.block
        gradients["gathered gradients"] = 4 * RING * size.block
    layer = stream * size.layer_keeps + copies / size.layers
    activations = 4 * stream * size.layers if train.gradient_checkpointing else layer * size.layers
    again = {"a layer computed again": layer} if train.gradient_checkpointing else {}
    ends = stream * (size.final_norm_keeps + 4 + 4 + compute)
    # Gradients of the residual stream and of the feed-forward part.
    passing = {"gradients passing through a layer": stream * (8 + 4 * size.feed_forward / size.width)}
    moments = {
        "while the loss is computed": {
            **{"activations": activations + ends, "loss": _loss_bytes(size, pass_tokens, compute, device)},
            **kept_before,
            **({"weights cast by autocast": copies} if train.gradient_checkpointing else {}),
        },
        "as the backward pass begins": {"activations": activations, "loss": 8 * head} | kept_before | again | passing,
        "in the backward pass of the first layer": {"activations": layer} | gradients | passing,
        "as the backward pass ends": {"gradient of the embedding": 4 * head} | gradients,
        "in an evaluation": {"logits": _evaluation_bytes(spec, size, compute, device)},
    }
    if not kept_before and not sharded:  # the first layer's own gradients come last
        moments["in the backward pass of the first layer"]["gradients"] -= 4 * size.block
    moments = {name: states | parts for name, parts in moments.items()}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return moment, {name: value for name, value in moments[moment].items() if value}


def _loss_bytes(size: Sizes, pass_tokens: int, compute: int, device: Device) -> float:
    """The gradient of the output matrix, a copy of that, and the logits of a block of rows, or of two in turn."""
    rows = min(max(1, LOSS_LOGITS[device] // size.vocab_size), pass_tokens)
    rows = min(LOSS_ROWS, rows) if device == "cpu" else rows
    of_block = rows * size.vocab_size
    two_blocks = of_block * min(2, math.ceil(pass_tokens / rows))
    head = size.vocab_size * size.width
    return (4 if compute == 4 else 6) * (head + max(two_blocks, head + of_block))


def _evaluation_bytes(spec: RunSpec, size: Sizes, compute: int, device: Device) -> float:
    tokens = spec.data.context
    fitting = max(1, EVALUATION_LOGITS[device] // (tokens * size.vocab_size))
    elements = min(spec.train.micro_batch_sequences, fitting) * tokens * size.vocab_size
    return elements * (4 if compute == 4 else 6)


def find_gpu(name: str) -> str | None:
    """The key in `GPUS` of a device as torch names it, e.g. "NVIDIA H100 80GB HBM3"; None for an unknown one."""
    squeezed = name.lower().replace(" ", "").replace("-", "")
    fitting = [key for key in GPUS if all(part in squeezed for part in key.split("-"))]
    return max(fitting, key=len, default=None)


def describe_estimate(
    spec: RunSpec,
    gpu: Gpu,
    *,
    name: str,
    processes: int = 1,
    utilisation: float = UTILISATION,
    tokens: float | None = None,
) -> str:
    """Parameters, operations, memory, time; `tokens` of a run that counts epochs. Raises ValueError as `sizes_of`."""
    size, train, flops = sizes_of(spec), spec.train, training_flops(spec, 1)
    moment, parts = peak_memory(spec, processes=processes)
    rows = parts | {"CUDA context, libraries, gaps (assumed)": CONTEXT_BYTES}
    needed = sum(rows.values()) / GIB
    tflops = gpu.fp32_tflops if train.precision == "fp32" else gpu.bf16_tflops
    speed = utilisation * tflops * 1e12 / flops
    time = f"{1e9 / speed / 3600:.2f} GPU-hours a billion tokens (tokens=2.1e9 gives those of a run)"
    if total := (train.steps or 0) * train.batch_sequences * spec.data.context or tokens:
        hours = total / speed / 3600
        time = f"{total / 1e6:,.0f} M tokens: {duration(total / speed / processes)}, {hours:.2f} GPU-hours"
    fits = "fits" if needed <= gpu.memory_gib else f"does not fit; give {ADVICE}"
    lines = [
        f"{spec.preset} {spec.label}: {size.parameters:,} parameters, {flops:.2e} FLOPs of training a token",
        f"each of {processes} {name}: {train.precision}, train.sharding={train.sharding}, passes of "
        f"{train.micro_batch_sequences} x {spec.data.context} tokens; most is held {moment}",
        *(f"  {part:<41}{value / GIB:8.2f} GiB" for part, value in rows.items()),
        f"  {'together':<41}{needed:8.2f} GiB of {gpu.memory_gib:g} GiB: {fits}",
        f"{speed * processes:,.0f} tokens/s if {utilisation:.0%} of {tflops:g} TFLOP/s are reached (assumed); {time}",
    ]
    if uncounted := _not_counted(spec):
        lines.append(f"not counted: {', '.join(uncounted)}")
    return "\n".join(lines)


def _not_counted(spec: RunSpec) -> list[str]:
    """Settings of a run that need memory or parameters beyond the estimate, as key=value."""
    model = config_of(spec)
    fields = [f"model.{name}={model[name]}" for name in NOT_COUNTED if model[name] != NORMFREE_DEFAULTS[name]]
    activations = spread_over_layers(model["activation"], model["num_hidden_layers"])
    fields += [f"model.{name}={model[name]}" for name in ("norm", "final_norm") if model[name] not in NORMS]
    fields += [f"model.activation={name}" for name in dict.fromkeys(activations) if name not in ACTIVATION_KEEPS]
    if spec.train.objective != "next_token":
        fields.append(f"train.objective={spec.train.objective}")
    return fields


def check_memory(spec: RunSpec, memory_gib: float, *, name: str, processes: int = 1, runs: int = 1) -> None:
    """Raise ValueError if one run, or `runs` at once, need more than each GPU has; only decoders are checked."""
    if not family_of(spec.to_dict()).causal:
        return
    _, parts = peak_memory(spec, processes=processes)
    each = (sum(parts.values()) + CONTEXT_BYTES) / GIB
    if runs * each <= memory_gib:
        return
    needs, advice = f"this run needs about {each:.1f} GiB", ADVICE
    if runs > 1:
        needs = f"workers={runs}: {runs} runs of {each:.1f} GiB need {runs * each:.1f} GiB"
        advice = f"workers={max(1, int(memory_gib / each))} or fewer"
    has = f"{name} has {memory_gib:.1f} (`normfree estimate` shows the parts)"
    raise ValueError(f"{needs}, and {has}: give {advice}")
