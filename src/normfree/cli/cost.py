"""The verbs `cost` and `estimate`. Imports are local, so that --help stays fast."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from normfree.cli.options import Options
from normfree.files import write_atomically
from normfree.spec.keys import build, nearest
from normfree.spec.run import Count, Positive
from normfree.store.runs import RUN_FILE, read_run


class CostOptions(Options):
    variant: str | None = None
    """MODEL=PRESET only: which variant of it; unless given, sm-ln-g."""
    activation: str | None = None
    """MODEL=PRESET only: in place of the variant's, e.g. gelu_tanh, the form behind the published totals of GPT-2, or
    silu; or one a layer, [relu,gelu,...]."""
    context: int | None = None
    """Tokens in the one sequence; unless given, a run's or preset's own, else 128 or the model's longest."""
    protocol: str = "cheetah"
    """cheetah (the published totals' protocol) or semi2k."""
    network: str = "wan"
    """lan or wan: bandwidth and delay for the lower bound of the time."""
    bandwidth_mbps: float | None = None
    """Overrides the network's bandwidth, in each direction."""
    delay_ms: float | None = None
    """Overrides the network's delay, one way (half of a ping), charged once a round."""
    constants: Path | None = None
    """File of prices (docs/private-inference.md); unless given, the package's own."""
    output: Path | None = None
    """Also write the numbers to this file: .json or .csv."""


def cost(name: str, options: CostOptions) -> None:
    """Print what one forward pass costs in private inference, by operation and by layer."""
    from normfree.cost import of_config
    from normfree.cost.constants import CONSTANTS_FILE
    from normfree.report.tables.cost import cost_csv, cost_markdown, cost_record
    from normfree.spec.compose import members

    if options.output and options.output.suffix not in (".json", ".csv"):
        raise ValueError(f"output={options.output}: name a file that ends in .json or .csv")
    read_config = _config_of_preset if name in members("preset") else _config_of_model
    config, own_context, facts = read_config(name, options)
    facts |= options.model_dump(include={"protocol", "network", "bandwidth_mbps", "delay_ms"})
    context = own_context if options.context is None else options.context
    model_cost = of_config(config, **facts, context=context, constants=options.constants or CONSTANTS_FILE)
    print(cost_markdown(model_cost), end="")
    if options.output:
        as_json = json.dumps(cost_record(model_cost), indent=1) + "\n"
        write_atomically(options.output, as_json if options.output.suffix == ".json" else cost_csv(model_cost))
        print(f"\nThe numbers: {options.output}")


def _config_of_preset(name: str, options: CostOptions) -> tuple[Any, int, dict[str, Any]]:
    """(config, context, the model's name and a note on its vocabulary)."""
    from normfree.cost.training import config_of
    from normfree.spec.compose import compose_unchecked

    variant = "sm-ln-g" if options.variant is None else options.variant
    if variant == "custom":
        raise ValueError("variant=custom says no norm: take another variant with activation=, or price a saved run")
    spec = compose_unchecked({"preset": name, "variant": variant})
    context = spec.data.context if options.context is None else options.context
    config = config_of(spec) | {"max_position_embeddings": max(context, spec.data.context)}  # positions cost nothing
    facts = {"name": f"{name} {spec.label}"}
    if (activation := options.activation) is not None:
        several = activation.strip().startswith("[")
        config["activation"] = [each.strip() for each in activation.strip()[1:-1].split(",")] if several else activation
        facts["name"] = f"{name} variant={variant} activation={activation}"
    if spec.data.tokenizer:
        facts["note"] = f"Assumed GPT-2's {config['vocab_size']:,} tokens because the real tokenizer is not downloaded."
    return config, context, facts


def _config_of_model(name: str, options: CostOptions) -> tuple[Any, int, dict[str, Any]]:
    """(config, context, the model's name) of a run, a folder, a published shape or a name on the hub."""
    from normfree.cost.families import SHAPES, read_architecture
    from normfree.cost.totals import config_of_run
    from normfree.spec.compose import members

    for key in ("variant", "activation"):
        if (value := getattr(options, key)) is not None:
            raise ValueError(f"{key}={value} is for a preset, and {name} is none of {', '.join(members('preset'))}")
    if (Path(name) / RUN_FILE).is_file():
        run = read_run(name)
        return config_of_run(run), run.spec["data"]["context"], {"name": name}
    config: Any = SHAPES.get(name)
    if config is None or Path(name).exists():
        from normfree.pretrained.load import load_config  # loads torch

        try:
            config = load_config(name).to_dict()
        except ValueError as error:
            if Path(name).exists() or "/" in name:
                raise
            raise ValueError(f"{error}; presets and shapes: {nearest(name, [*members('preset'), *SHAPES])}") from None
    longest = read_architecture(config).max_tokens
    return config, longest if config["model_type"] == "normfree" else min(128, longest), {"name": name}


class EstimateOptions(Options):
    """Keys of `normfree estimate` beside those of a run."""

    gpus: Count = 1
    """GPUs that share every batch, one process each."""
    gpu: str = "h100"
    """Name of the GPU, as NVIDIA's data sheets have it."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the GPU's peak that is assumed for the time."""
    tokens: Positive | None = None
    """Tokens of the whole run, where it counts epochs."""


def estimate(words: Sequence[str]) -> None:
    """Print what a run needs on each GPU: parameters, memory by part, and time; also gpus=, gpu=, tokens=."""
    from normfree.cost.estimate import GPUS, describe_estimate
    from normfree.spec.compose import compose_unchecked, read_words

    values = read_words(words)
    own = {key: values.pop(key) for key in EstimateOptions.model_fields if key in values}
    options = build(EstimateOptions, own)
    if options.gpu not in GPUS:
        raise ValueError(f"gpu={options.gpu}; {nearest(options.gpu, list(GPUS))}")
    spec = compose_unchecked(values)
    if options.tokens and spec.train.steps:
        steps = spec.train.steps
        raise ValueError(f"tokens= is for runs that count epochs, and this one has train.steps={steps}: leave it out")
    batch, micro = spec.train.batch_sequences, spec.train.micro_batch_sequences
    if batch % (together := micro * options.gpus):
        raise ValueError(
            f"train.batch_sequences={batch} must be a multiple of {together}, which is gpus={options.gpus} times "
            f"train.micro_batch_sequences={micro}: give a smaller one, or fewer gpus"
        )
    facts = {"processes": options.gpus, "utilisation": options.utilisation, "tokens": options.tokens}
    print(describe_estimate(spec, GPUS[options.gpu], name=options.gpu, **facts))
