"""The verb `estimate`. Imports are local, so that --help stays fast."""

from __future__ import annotations

from collections.abc import Sequence

from normfree.cli.options import Options


class EstimateOptions(Options):
    """Keys of `normfree estimate` beside those of a run."""

    gpus: int = 1
    """GPUs that share every batch, one process each."""
    gpu: str = "h100"
    """Name of the GPU, as NVIDIA's data sheets have it."""
    utilisation: float = 0.4
    """Share of the GPU's peak that is assumed for the time."""
    tokens: float | None = None
    """Tokens of the whole run, where it counts epochs."""


def estimate(words: Sequence[str]) -> None:
    """Print what a run needs on each GPU: parameters, memory by part, and time; also gpus=, gpu=, tokens=."""
    from normfree.cost.estimate import GPUS, describe_estimate
    from normfree.spec.compose import compose_unchecked, read_words
    from normfree.spec.keys import build, nearest

    values = read_words(words)
    own = {key: values.pop(key) for key in EstimateOptions.model_fields if key in values}
    options = build(EstimateOptions, own)
    if options.gpu not in GPUS:
        raise ValueError(f"gpu={options.gpu}; {nearest(options.gpu, list(GPUS))}")
    for name, low in (("gpus", options.gpus < 1), ("tokens", (options.tokens or 1) <= 0)):
        if low:
            raise ValueError(f"{name}={getattr(options, name)} must be above 0")
    if not 0 < options.utilisation <= 1:
        raise ValueError(f"utilisation={options.utilisation} must be above 0 and at most 1")
    spec = compose_unchecked(values)
    if spec.train.sharding != "none" and options.gpus == 1:
        raise ValueError(f"train.sharding={spec.train.sharding} with gpus=1: give gpus=2 or more, or leave it out")
    facts = {"processes": options.gpus, "utilisation": options.utilisation, "tokens": options.tokens}
    print(describe_estimate(spec, GPUS[options.gpu], name=options.gpu, **facts))
