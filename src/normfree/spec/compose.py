"""From Hydra's YAML and the user's `key=value` to a checked RunSpec. Nothing behind this file sees OmegaConf."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normfree.spec.keys import describe_keys, nearest
from normfree.spec.run import NOT_SET_ALONE, RunSpec

if TYPE_CHECKING:
    from normfree.model import NormFreeConfig  # loads torch, which --help and report do not need

CONF = Path(__file__).parent / "conf"
GROUPS = ("data", "preset", "variant")
PLACES = ("runs_dir", "cache_dir")
NAMES = ("study", "tag")
OF_THE_CORPUS = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")
"""Fields of a model that a run has from its corpus where none is given."""
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")  # 1e-3 is text to PyYAML
_FIELD = re.compile(r'^    (\w+): (.+) = (.+)\n    """(.+)"""$', re.MULTILINE)  # of NormFreeConfig
_HINTS = {
    "batch_size": "did you mean train.batch_sequences?",
    "gradient_accumulation_steps": "did you mean train.micro_batch_sequences?",
    "learning_rate": "did you mean train.peak_learning_rate?",
    "lr": "did you mean train.peak_learning_rate?",
    "max_steps": "did you mean train.steps?",
    "source": "say data=NAME, which also sets how that text is cut",
    "workers": "it is a key of `normfree study`",
}
"""The end of an error line on keys that other programs or other commands have."""


@dataclass(frozen=True)
class Composed:
    """A run and where it is to be put."""

    spec: RunSpec
    runs_dir: Path
    cache_dir: Path | None


def compose_run(overrides: Sequence[str]) -> Composed:
    """Compose the configuration with `key=value` overrides, the last one winning.

    Raises ValueError, with the nearest valid names, for an unknown key, group member or value.
    """
    with initialize_config_dir(str(CONF), version_base=None):
        try:
            composed = compose("config", [forced(text) for text in checked(overrides, many=False)])
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(str(error).strip().splitlines()[0]) from error
    return from_hydra(composed)


def from_hydra(composed: DictConfig) -> Composed:
    """Plain, checked values from what Hydra composed."""
    from normfree.model import NormFreeConfig

    values: Any = OmegaConf.to_container(composed, resolve=True)
    runs_dir, cache_dir = (values.pop(name) for name in PLACES)
    if not runs_dir:
        raise ValueError(f"runs_dir={runs_dir}: name a folder, e.g. runs_dir=runs")
    model = values["model"]
    names, layers = model.get("activation"), model["num_hidden_layers"]
    as_declared = isinstance(names, list) and names == _declared_by(values["variant"]).get("activation")
    if as_declared and isinstance(layers, int):
        model["activation"] = _stretched(names, layers)
    config = NormFreeConfig(**model)
    # 1 and 1.0 are one model, so one identity.
    values["model"] = {
        name: float(value) if isinstance(getattr(config, name), float) else value for name, value in model.items()
    }
    spec = RunSpec.from_dict(values)
    _check_read(spec, config)
    _check_label(spec, config)
    return Composed(spec=spec, runs_dir=Path(runs_dir), cache_dir=Path(cache_dir) if cache_dir else None)


def _declared_by(variant: str) -> dict[str, Any]:
    """What makes a variant; the value of a slope does not, a tag tells runs with other slopes apart."""
    model = yaml.safe_load((CONF / "variant" / f"{variant}.yaml").read_text(encoding="utf-8")).get("model", {})
    return {key: value for key, value in model.items() if key != "negative_slope"}


def _stretched(names: str | list[str], layers: int) -> list[str]:
    """The activation of each layer: each name takes an equal part of the layers, the first ones one more."""
    names = [names] if isinstance(names, str) else names
    return [names[layer * len(names) // layers] for layer in range(layers)]


def _check_label(spec: RunSpec, config: NormFreeConfig) -> None:
    """Raises ValueError for a model that is not the variant's: folder, label and the published numbers beside a run go
    by that."""
    if spec.variant == "custom" and (unsaid := [key for key in ("norm", "activation") if key not in spec.model]):
        raise ValueError(
            f"variant=custom does not say model.{' and model.'.join(unsaid)}: give both, e.g. model.norm=none "
            "model.activation=relu"
        )

    def differing(variant: str) -> list[str]:
        declared = _declared_by(variant)
        if "activation" in declared:
            declared["activation"] = _stretched(declared["activation"], config.num_hidden_layers)
        actual = config.to_dict() | {"activation": config.layer_activations}
        return [key for key, value in declared.items() if actual[key] != value]

    if not (wrong := differing(spec.variant)):
        return
    fitting = [name for name in members("variant") if name != "custom" and not differing(name)]
    advice = f"that is variant={fitting[0]}" if fitting else "say variant=custom, with a tag that names it"
    given = ", model.".join(f"{key}={getattr(config, key)!r}" for key in wrong)
    raise ValueError(f"variant={spec.variant} with model.{given} would bear a wrong label: {advice}")


def _check_read(spec: RunSpec, config: NormFreeConfig) -> None:
    """Raises ValueError for a setting other than the default that nothing in this model reads."""
    from normfree.model.activations import IN_THIS_FILE

    names = set(config.layer_activations)
    of_ones_own = bool(names - IN_THIS_FILE.keys())  # such an activation may read and learn slopes
    rotary = config.position == "rotary", "model.position=rotary"
    learned = of_ones_own or config.learnable_slope != "none", "model.learnable_slope=per_layer or shared"
    needs = {
        "rotary_share": rotary,
        "rotary_base": rotary,
        "norm_epsilon": ({config.norm, config.final_norm} != {"none"}, "a norm"),
        "negative_slope": (of_ones_own or "leaky_relu" in names, "model.activation=leaky_relu"),
        "decay_slopes": learned,
        "slope_learning_rate_factor": learned,
    }
    for name, (is_read, reader) in needs.items():
        part, owner = ("model", config) if hasattr(config, name) else ("train", spec.train)
        if not is_read and (value := getattr(owner, name)) != getattr(type(owner), name):
            raise ValueError(f"{part}.{name}={value} is read with {reader} only: leave it out")


def checked(overrides: Sequence[str], *, many: bool = True) -> list[str]:
    """The overrides. Raises ValueError for a key or a group member that does not exist, and unless `many`, for what is
    for several runs."""
    allowed = allowed_keys()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is not of the form key=value")
        if key.startswith("hydra"):
            if not many:
                raise ValueError(f"{text!r} is for many runs: `normfree train -m`")
            continue
        if key not in allowed:
            raise ValueError(f"unknown key {key!r}; {_meant(key, allowed)}")
        for member in value.split(",") if key in GROUPS else ():
            if member not in members(key):
                raise ValueError(f"unknown {key} {member!r}; {nearest(member, members(key))}")
        try:
            parsed = OverridesParser.create().parse_override(text)
        except HydraException:
            quoted = "['...','...']" if value.startswith("[") else "'...'"
            raise ValueError(f'cannot read {text!r}; quote what has special characters: "{key}={quoted}"') from None
        if parsed.is_sweep_override() and not many:
            raise ValueError(f"{text!r} is several values: `normfree train -m` trains one run for each")
    return list(overrides)


def _meant(key: str, allowed: list[str]) -> str:
    """The end of an error line on a key that does not exist."""
    last = key.rpartition(".")[2]
    if "optim" in last:
        return "the optimiser is AdamW (train.adam_beta1, adam_beta2, adam_epsilon, weight_decay)"
    if "schedule" in last:
        return "it rises over train.warmup_share and falls linearly to train.final_learning_rate (the peak: constant)"
    same = [known for known in allowed if known.rpartition(".")[2] == last]
    hint = _HINTS.get(last) or (f"did you mean {' or '.join(same)}?" if same else nearest(key, allowed))
    return "`normfree train --help` has all of them" if hint.startswith("allowed") else hint


def forced(override: str) -> str:
    """Let an override of a nested key add what the YAML leaves at its default, e.g. `++model.bias=all`."""
    key = override.partition("=")[0]
    return f"++{override}" if "." in key and not key.startswith("hydra") else override


def override(key: str, value: Any) -> str:
    """The override that gives `key` the value that a YAML file has, whatever characters it has."""
    bare = key in GROUPS or (key not in NAMES and isinstance(value, str) and _EXPONENT.fullmatch(value))
    return f"{key}={value if bare else _as_hydra_reads(value)}"


def _as_hydra_reads(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_as_hydra_reads, value))}]"
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    return "null" if value is None else str(value)


def members(group: str) -> list[str]:
    """The members of a configuration group, e.g. the presets; of `studies`, those that come with the package."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def describe_run() -> list[tuple[str, Any, str]]:
    """(key, value in a run without overrides, meaning) of every key that may be set alone, for --help.

    The fields of the model are read off their source: importing them loads torch, which takes seconds.
    """
    rows = describe_keys(RunSpec)
    source = (Path(__file__).parents[1] / "model" / "configuration.py").read_text(encoding="utf-8")
    for name, kind, default, meaning in _FIELD.findall(source):
        if kind.startswith("Literal["):
            meaning += f" {kind.removeprefix('Literal')}".replace('"', "").replace(", ", " | ")
        rows[f"model.{name}"] = (None if name in OF_THE_CORPUS else default.strip('"'), meaning)
    with initialize_config_dir(str(CONF), version_base=None):
        parts: Any = OmegaConf.to_container(compose("config"))
    values = {
        f"{part}.{key}": value for part in ("data", "train", "probe", "model") for key, value in parts[part].items()
    }
    return [(key, values.get(key, row[0]), row[1]) for key, row in rows.items() if key not in NOT_SET_ALONE]


def allowed_keys() -> list[str]:
    """Every key a user may set."""
    from normfree.model import NormFreeConfig

    spec_keys = [key for key in describe_keys(RunSpec) if key not in NOT_SET_ALONE]
    return [*GROUPS, *PLACES, *spec_keys, *(f"model.{name}" for name in NormFreeConfig.__annotations__)]
