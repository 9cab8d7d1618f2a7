"""Runs in the virtual environment of SecretFlow SPU, never in ours: `python simulator.py < job.json > answer.json`.

The job is `{"protocol": "cheetah", "operation": "softmax", "shapes": [[64, 128], [128, 128]]}`; the answer has one
`[bytes over both directions, messages of one party, bytes of matrix products]` per shape, and the settings. The
operation "block" is one block of a model instead: `inputs` and `output` name .npz files, `settings` says how it is
built, `copies` how many times each program runs it. Every input is secret. The constants depend on how an operation is
written down, so the formulas below are part of them.

Shape legend: T tokens, E hidden size
"""

# pyright: reportMissingImports=false
# SPU and jax are installed only where this file runs.
from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import spu.libspu as spu
import spu.utils.simulation as simulation

PROTOCOLS = {"cheetah": spu.ProtocolKind.CHEETAH, "semi2k": spu.ProtocolKind.SEMI2K}
FRACTION_BITS = 18
PATIENCE_MS = 600_000
"""How long a party waits for a message. SPU's 30 seconds are less than a wide product of CHEETAH takes on two cores."""
LINK_DESCRIPTION = spu.link.Desc
LINK = re.compile(r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+)")
PRODUCTS = re.compile(r"pphlo\.dot(?:_general)?, .*?send bytes (\d+) recv bytes (\d+)")


def gelu_erf(x):
    """Through erf as PyTorch writes it; jax.nn.gelu goes through erfc, which costs 2.6 times as much (SEMI2K)."""
    return 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2)))


def gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


def leaky_relu(x, slope):
    positive = jax.nn.relu(x)
    return positive + slope * (x - positive)


def layernorm(x, scale, shift, epsilon=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon) * scale + shift


def rmsnorm(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def softmax(x):
    """exp is clipped below -14, and each row is divided by one reciprocal: 2.6 times cheaper than jax.nn.softmax."""
    x = x - x.max(-1, keepdims=True)
    powers = jnp.where(x > -14, jnp.exp(x), 0.0)
    return powers * (1 / powers.sum(-1, keepdims=True))


# operation -> (function, how many inputs of the shape, how many inputs of one row)
OPERATIONS: dict[str, tuple[Callable, int, int]] = {
    "relu": (jax.nn.relu, 1, 0),
    "gelu_tanh": (gelu_tanh, 1, 0),
    "gelu_erf": (gelu_erf, 1, 0),
    "silu": (jax.nn.silu, 1, 0),
    "product": (lambda x, y: x * y, 2, 0),
    "public_product": (lambda x: x * 0.37, 1, 0),
    "layernorm": (layernorm, 1, 2),
    "rmsnorm": (rmsnorm, 1, 1),
    "softmax": (softmax, 1, 0),
}

ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x, slope: gelu_erf(x),
    "gelu_tanh": lambda x, slope: gelu_tanh(x),
    "relu": lambda x, slope: jax.nn.relu(x),
    "leaky_relu": leaky_relu,
    "identity": lambda x, slope: x,
}
NORMS: dict[str, Callable] = {
    "layernorm": lambda x, weights, name, epsilon: layernorm(
        x, weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon
    ),
    "none": lambda x, weights, name, epsilon: x,
}
MASKED = -1e4
"""Added to the score of a later token; the softmax clips it to a weight of 0."""


def linear(x, weights, name):
    """Weights are (out, in), as PyTorch keeps them. A sum with a bias sends nothing."""
    result = x @ weights[f"{name}.weight"].T
    return result + weights[f"{name}.bias"] if f"{name}.bias" in weights else result


def rotate(x, cosines, sines):
    """Dimension i of the rotating ones pairs with i + half of them (GPT-NeoX); the angles are public."""
    turning, still = jnp.split(x, [cosines.shape[-1]], axis=-1)
    first, second = jnp.split(turning, 2, axis=-1)
    turned = turning * cosines + jnp.concatenate([-second, first], axis=-1) * sines
    return jnp.concatenate([turned, still], axis=-1)


def attention(x, weights, public, heads):
    """x (T, E); the scale of the scores is folded into the query weights."""
    tokens = x.shape[0]
    queries, keys, values = linear(x, weights, "attention.qkv").reshape(tokens, 3, heads, -1).transpose(1, 2, 0, 3)
    if "cosines" in public:
        queries, keys = (rotate(states, public["cosines"], public["sines"]) for states in (queries, keys))
    scores = queries @ keys.transpose(0, 2, 1) + np.triu(np.full((tokens, tokens), MASKED, dtype=np.float32), 1)
    mixed = softmax(scores) @ values
    return linear(mixed.transpose(1, 0, 2).reshape(tokens, -1), weights, "attention.output")


def block(x, weights, public, settings):
    """One block on the hidden states of one sequence, (T, E)."""

    def norm(states, name):
        return NORMS[settings["norm"]](states, weights, name, settings["norm_epsilon"])

    def feed_forward(states):
        slope = weights.get("slope", settings["negative_slope"])
        features = linear(norm(states, "feed_forward_norm"), weights, "feed_forward.input")
        return linear(ACTIVATIONS[settings["activation"]](features, slope), weights, "feed_forward.output")

    attended = x + attention(norm(x, "attention_norm"), weights, public, settings["heads"])
    return attended + feed_forward(x if settings["residual"] == "parallel" else attended)


def run_block(job: dict) -> list[tuple[int, int, int]]:
    """Traffic of programs that run the block once, twice, ...; the output of the last one's first goes to its file."""
    weights = dict(np.load(job["inputs"]))
    hidden = weights.pop("hidden")
    public = {name: weights.pop(name) for name in ("cosines", "sines") if name in weights}

    def program(inputs, weights):
        return [block(x, weights, public, job["settings"]) for x in inputs]

    answers, outputs = [], []
    for copies in job["copies"]:
        # Different inputs, or the compiler would run one block for both.
        inputs = [hidden + 0.01 * copy for copy in range(copies)]
        answer, outputs = traffic(job["protocol"], program, inputs, weights)
        answers.append(answer)
    np.savez(job["output"], output=outputs[0])
    return answers


def traffic(protocol: str, function: Callable, *inputs) -> tuple[tuple[int, int, int], Any]:
    """(bytes, messages sent by the first party, bytes of matrix products) from the profile that SPU logs, and the
    result. Bytes are of both directions."""
    config = spu.RuntimeConfig(protocol=PROTOCOLS[protocol], field=spu.FieldType.FM64, fxp_fraction_bits=FRACTION_BITS)
    config.enable_pphlo_profile = True
    with tempfile.TemporaryFile() as log:
        saved = [os.dup(stream) for stream in (1, 2)]
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            result = simulation.sim_jax(simulation.Simulator(2, config), function)(*inputs)
        finally:
            for stream, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
        log.seek(0)
        text = log.read().decode()
    link = LINK.search(text)
    if link is None:
        raise RuntimeError(f"SPU logged no link details:\n{text[-2000:]}")
    sent, received, messages = map(int, link.groups())
    products = sum(int(number) for line in PRODUCTS.findall(text) for number in line)
    return (sent + received, messages, products), result


def run_operation(job: dict) -> list[tuple[int, int, int]]:
    random = np.random.default_rng(0)
    function, of_shape, of_row = OPERATIONS[job["operation"]]
    answers = []
    for shape in job["shapes"]:
        sizes = [shape] * of_shape + [shape[-1:]] * of_row
        inputs = [random.normal(size=size).astype(np.float32) for size in sizes]
        answers.append(traffic(job["protocol"], function, *inputs)[0])
    return answers


def describe_link() -> spu.link.Desc:
    description = LINK_DESCRIPTION()
    description.recv_timeout_ms = PATIENCE_MS
    return description


def main() -> None:
    spu.link.Desc = describe_link  # the simulator describes its links itself, with SPU's own limit of time
    job = json.load(sys.stdin)
    answers = run_block(job) if job["operation"] == "block" else run_operation(job)
    versions = ", ".join(f"{name} {version(name)}" for name in ("spu", "jax", "numpy"))
    print(json.dumps({"traffic": answers, "settings": f"{versions}, FM64, {FRACTION_BITS} fractional bits"}))


if __name__ == "__main__":
    main()
