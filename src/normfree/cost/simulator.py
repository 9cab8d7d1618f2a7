"""Runs in the virtual environment of SecretFlow SPU, never in ours: `python simulator.py < job.json > traffic.json`.

The job is `{"protocol": "cheetah", "operation": "softmax", "shapes": [[64, 128], [128, 128]]}`; the answer is one
`[bytes over both directions, messages of one party]` per shape, and the versions. Every input is secret. The
constants depend on how an operation is written down, so the formulas below are part of them.
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

import jax
import jax.numpy as jnp
import numpy as np
import spu.libspu as spu
import spu.utils.simulation as simulation

PROTOCOLS = {"cheetah": spu.ProtocolKind.CHEETAH, "semi2k": spu.ProtocolKind.SEMI2K}
FRACTION_BITS = 18
LINK = re.compile(r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+)")


def gelu_erf(x):
    """Through erf as PyTorch writes it; jax.nn.gelu goes through erfc, which costs 2.6 times as much (SEMI2K)."""
    return 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2)))


def layernorm(x, scale, shift):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5) * scale + shift


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
    "gelu_tanh": (lambda x: jax.nn.gelu(x, approximate=True), 1, 0),
    "gelu_erf": (gelu_erf, 1, 0),
    "silu": (jax.nn.silu, 1, 0),
    "product": (lambda x, y: x * y, 2, 0),
    "public_product": (lambda x: x * 0.37, 1, 0),
    "layernorm": (layernorm, 1, 2),
    "rmsnorm": (rmsnorm, 1, 1),
    "softmax": (softmax, 1, 0),
}


def traffic(protocol: str, function: Callable, inputs: list[np.ndarray]) -> tuple[int, int]:
    """Bytes over both directions and messages sent by the first party, from the profile that SPU logs."""
    config = spu.RuntimeConfig(protocol=PROTOCOLS[protocol], field=spu.FieldType.FM64, fxp_fraction_bits=FRACTION_BITS)
    config.enable_pphlo_profile = True
    with tempfile.TemporaryFile() as log:
        saved = [os.dup(stream) for stream in (1, 2)]
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            simulation.sim_jax(simulation.Simulator(2, config), function)(*inputs)
        finally:
            for stream, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
        log.seek(0)
        text = log.read().decode()
    found = LINK.search(text)
    if found is None:
        raise RuntimeError(f"SPU logged no link details:\n{text[-2000:]}")
    sent, received, messages = map(int, found.groups())
    return sent + received, messages


def main() -> None:
    job = json.load(sys.stdin)
    random = np.random.default_rng(0)
    function, of_shape, of_row = OPERATIONS[job["operation"]]
    answers = []
    for shape in job["shapes"]:
        sizes = [shape] * of_shape + [shape[-1:]] * of_row
        answers.append(traffic(job["protocol"], function, [random.normal(size=s).astype(np.float32) for s in sizes]))
    versions = {name: version(name) for name in ("spu", "jax", "numpy")}
    print(json.dumps({"traffic": answers, "versions": versions, "fraction_bits": FRACTION_BITS}))


if __name__ == "__main__":
    main()
