"""What `normfree cost`, `cost calibrate` and `cost measure` do. Imports are local, as in commands.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
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
    """File of prices, from `normfree cost calibrate`; unless given, the package's own."""


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Keys of `normfree cost calibrate`."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    python: Path | None = None
    """Python with SPU 0.9.5; unless given, NORMFREE_SPU_PYTHON, else spu/bin/python."""
    protocol: str = "semi2k"
    """semi2k (seconds) or cheetah (minutes): whose operations to measure."""
    constants: Path | None = None
    """File whose other numbers are kept; unless given, the package's own."""
    output: Path = Path("constants.json")
    """The file to write; it may be the file of constants= itself."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Keys of `normfree cost measure`."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    python: Path | None = None
    """Python with SPU 0.9.5; unless given, NORMFREE_SPU_PYTHON, else spu/bin/python."""
    protocol: str = "semi2k"
    """semi2k (seconds) or cheetah (one to two minutes)."""
    layer: int = 0
    """Which block, counted from 0."""
    tokens: int = 32
    """Length of the sequence that runs through the block."""
    text: Path | None = None
    """UTF-8 text file whose first tokens are taken; unless given, held-out Python code of this machine."""
    constants: Path | None = None
    """File of prices to predict with; unless given, the package's own."""


def cost(name: str, options: CostOptions) -> None:
    """Print what one forward pass costs in private inference, by operation and by layer."""
    from normfree.cost import of_config
    from normfree.cost.constants import CONSTANTS_FILE

    config, own_context, assumed = _config_of(name, options)
    found = of_config(
        config,
        context=own_context if options.context is None else options.context,
        protocol=options.protocol,
        network=options.network,
        bandwidth_mbps=options.bandwidth_mbps,
        delay_ms=options.delay_ms,
        constants=options.constants or CONSTANTS_FILE,
    )
    print(found.to_markdown() + assumed)


def calibrate(options: CalibrateOptions) -> None:
    """Measure the operations of a protocol again and write a file of constants."""
    from normfree.commands import check_writable
    from normfree.cost.calibrate import calibrate as measure
    from normfree.cost.calibrate import calibration_table, recalibrated
    from normfree.cost.constants import CONSTANTS_FILE, load_constants
    from normfree.manifest import write_atomically
    from normfree.tables import to_markdown

    output = options.output
    if output.is_dir() or not output.name:
        raise ValueError(f"output={output} is a folder: name a file, e.g. output={output / 'constants.json'}")
    if output.exists() and (options.constants is None or output.resolve() != options.constants.resolve()):
        raise ValueError(f"output={output} exists: add constants={output} to replace numbers in it, or name another")
    constants = options.constants or CONSTANTS_FILE
    check_writable(output.parent)  # before the work, not after it
    found = measure(options.python, protocol=options.protocol, constants=constants)
    content = recalibrated(load_constants(constants), found, protocol=options.protocol, day=date.today())
    write_atomically(output, json.dumps(content, indent=1) + "\n")
    print(to_markdown(calibration_table(found, protocol=options.protocol)))
    print(f"The constants: {output}; use them with `normfree cost MODEL constants={output}`")


def measure(name: str, options: MeasureOptions) -> None:
    """Run one block of a run in the simulator; print bytes, rounds and error beside the prediction."""
    from normfree.cost.constants import CONSTANTS_FILE
    from normfree.model_commands import read_text
    from normfree.simulate import measure_block
    from normfree.tables import to_markdown
    from normfree.training.process import prepare_process

    prepare_process()
    found = measure_block(
        name,
        lambda: read_text(options.text),
        python=options.python,
        protocol=options.protocol,
        layer=options.layer,
        tokens=options.tokens,
        constants=options.constants or CONSTANTS_FILE,
    )
    print(to_markdown(found.to_table()))
    print(
        f"Largest absolute error against PyTorch: {found.largest_error:.2g} (outputs up to {found.largest_output:.3g})"
    )


def _config_of(name: str, options: CostOptions) -> tuple[Any, int, str]:
    """(config, its own context, what is assumed) of a preset with a variant, a run, a folder or a hub name."""
    from normfree.compose import compose_run, members
    from normfree.config import nearest
    from normfree.cost.families import NORMFREE_DEFAULTS, read_architecture
    from normfree.cost.totals import config_of_run
    from normfree.pretrained import load_config
    from normfree.records import RUN_FILE, read_run

    if name in members("preset"):
        if options.variant == "custom":
            raise ValueError("variant=custom says no norm: take another variant with activation=, or price a saved run")
        variant = "sm-ln-g" if options.variant is None else options.variant
        spec = compose_run([f"preset={name}", f"variant={variant}"]).spec
        context = spec.data.context if options.context is None else options.context
        longest = max(context, spec.data.context)  # learned positions cost nothing
        sizes: dict[str, Any] = {"max_position_embeddings": longest, "vocab_size": spec.data.vocab_size}
        assumed = ""
        if spec.data.tokenizer:
            sizes["vocab_size"] = NORMFREE_DEFAULTS["vocab_size"]
            assumed = (
                f"\nVocabulary: GPT-2's {sizes['vocab_size']:,} pieces stand for {spec.data.tokenizer}, whose size is "
                "known only where it was loaded."
            )
        chosen = {} if options.activation is None else {"activation": _activation(options.activation)}
        return {"model_type": "normfree", **sizes, **spec.model, **chosen}, context, assumed
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


def _activation(given: str) -> str | list[str]:
    """A name, or the names in brackets, one a layer."""
    return [name.strip() for name in given.strip()[1:-1].split(",")] if given.strip().startswith("[") else given
