"""The verb `cost`. Imports are local, so that --help stays fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """Keys of `normfree cost`."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    variant: str | None = None
    """MODEL=PRESET only: which variant of it; unless given, sm-ln-g."""
    activation: str | None = None
    """MODEL=PRESET only: in place of the variant's, e.g. gelu_tanh, the form behind the published totals of GPT-2; or
    one a layer, [relu,gelu,...]."""
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


def cost(name: str, options: CostOptions) -> None:
    """Print what one forward pass costs in private inference, by operation and by layer."""
    from normfree.cost import of_config
    from normfree.cost.constants import CONSTANTS_FILE
    from normfree.report.tables.cost import cost_markdown
    from normfree.spec.compose import members

    read_config = _config_of_preset if name in members("preset") else _config_of_model
    config, own_context, note = read_config(name, options)
    model_cost = of_config(
        config,
        context=own_context if options.context is None else options.context,
        protocol=options.protocol,
        network=options.network,
        bandwidth_mbps=options.bandwidth_mbps,
        delay_ms=options.delay_ms,
        constants=options.constants or CONSTANTS_FILE,
    )
    print(cost_markdown(model_cost) + note)


def _config_of_preset(name: str, options: CostOptions) -> tuple[Any, int, str]:
    """(config, context, a note on its vocabulary)."""
    from normfree.cost.families import NORMFREE_DEFAULTS
    from normfree.spec.compose import compose_run

    if options.variant == "custom":
        raise ValueError("variant=custom says no norm: take another variant with activation=, or price a saved run")
    variant = "sm-ln-g" if options.variant is None else options.variant
    spec = compose_run([f"preset={name}", f"variant={variant}"]).spec
    context = spec.data.context if options.context is None else options.context
    longest = max(context, spec.data.context)  # learned positions cost nothing
    config: dict[str, Any] = {"model_type": "normfree", "max_position_embeddings": longest}
    config |= {"vocab_size": spec.data.vocab_size, **spec.model}
    if (activation := options.activation) is not None:
        several = activation.strip().startswith("[")
        config["activation"] = [each.strip() for each in activation.strip()[1:-1].split(",")] if several else activation
    if not spec.data.tokenizer:
        return config, context, ""
    config["vocab_size"] = vocab_size = NORMFREE_DEFAULTS["vocab_size"]
    stands_for = f"{vocab_size:,} pieces stand for {spec.data.tokenizer}, whose size is known only where it was loaded."
    return config, context, f"\nVocabulary: GPT-2's {stands_for}"


def _config_of_model(name: str, options: CostOptions) -> tuple[Any, int, str]:
    """(config, context, no note) of a run, a folder or a name on the hub."""
    from normfree.cost.families import read_architecture
    from normfree.cost.totals import config_of_run
    from normfree.pretrained.load import load_config
    from normfree.spec.compose import members
    from normfree.spec.keys import nearest
    from normfree.store.runs import RUN_FILE, read_run

    for key in ("variant", "activation"):
        if (value := getattr(options, key)) is not None:
            raise ValueError(f"{key}={value} is for a preset, and {name} is none of {', '.join(members('preset'))}")
    if (Path(name) / RUN_FILE).is_file():
        run = read_run(name)
        return config_of_run(run), run.spec["data"]["context"], ""
    try:
        config = load_config(name)
    except ValueError as error:
        if Path(name).exists() or "/" in name:
            raise
        raise ValueError(f"{error}; presets: {nearest(name, members('preset'))}") from None
    longest = read_architecture(config).max_tokens
    return config, longest if config.model_type == "normfree" else min(128, longest), ""
