"""From Hydra's YAML and the user's `key=value` to a checked RunSpec. Nothing behind this file sees OmegaConf."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normfree.config import NOT_SET_ALONE, RunSpec, TrainSpec, known_keys, nearest, with_choices

CONF = Path(__file__).parent / "conf"
GROUPS = ("data", "preset", "variant")
PLACES = ("runs_dir", "cache_dir")
NAMES = ("study", "tag")
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
"""1e-3, which PyYAML reads as text."""


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
            composed = compose("config", [forced(text) for text in _single(checked(overrides))])
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(str(error).strip().splitlines()[0]) from error
    return from_hydra(composed)


def from_hydra(composed: DictConfig) -> Composed:
    """Plain, checked values from what Hydra composed."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    places = {name: values.pop(name) for name in PLACES}
    if not places["runs_dir"]:
        raise ValueError(f"runs_dir={places['runs_dir']}: name a folder, e.g. runs_dir=runs")
    values["model"] = {name: _as_declared(name, value) for name, value in values["model"].items()}
    _stretch(values["model"], _declared_by(values["variant"]))
    spec = RunSpec.from_dict(values)
    _check_model(spec)
    return Composed(
        spec=spec,
        runs_dir=Path(places["runs_dir"]),
        cache_dir=Path(places["cache_dir"]) if places["cache_dir"] else None,
    )


def _as_declared(name: str, value: Any) -> Any:
    """A whole number where the model has a float: 1 and 1.0 are one model, so one identity."""
    from normfree.model import NormFreeConfig

    return float(value) if type(value) is int and NormFreeConfig.__annotations__.get(name) is float else value


def _stretch(model: dict[str, Any], declared: Mapping[str, Any]) -> None:
    """Give each name of a variant's list of activations an equal part of the layers, the first ones one more. A list
    that names one twice is a pattern of its own, and is taken as it is."""
    from normfree.model import NormFreeConfig

    names = declared.get("activation")
    if isinstance(names, list) and len(set(names)) == len(names) and model.get("activation") == names:
        layers = model.get("num_hidden_layers", NormFreeConfig().num_hidden_layers)
        if type(layers) is not int:  # the check of the model says so
            return
        model["activation"] = [names[layer * len(names) // layers] for layer in range(layers)]


def _check_model(spec: RunSpec) -> None:
    """Raises ValueError for a model that cannot be built, or that is not the variant's: folder, label and the published
    numbers beside a run go by that."""
    from normfree.measures import periods_of
    from normfree.model import NormFreeConfig

    periods_of(spec.probe.measures, spec.probe.every_steps)
    model = NormFreeConfig(**spec.model).to_dict()  # fields that contradict each other are the first thing to say
    if spec.variant == "custom" and (unsaid := [key for key in ("norm", "activation") if key not in spec.model]):
        raise ValueError(
            f"variant=custom does not say model.{' and model.'.join(unsaid)}: give both, e.g. model.norm=none "
            "model.activation=relu"
        )
    _check_read(spec, model)
    declared = _declared_by(spec.variant)
    wrong = [f"{key}={model[key]!r}" for key in declared if not _same(model, declared, key)]
    if not wrong:
        return
    others = {name: _declared_by(name) for name in members("variant") if name != "custom"}
    fitting = [name for name, keys in others.items() if all(_same(model, keys, key) for key in keys)]
    advice = f"that is variant={fitting[0]}" if fitting else "say variant=custom, with a tag that names it"
    raise ValueError(f"variant={spec.variant} with model.{', model.'.join(wrong)} would bear a wrong label: {advice}")


def _check_read(spec: RunSpec, model: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting other than the default that nothing in this model reads."""
    from normfree.model import NormFreeConfig
    from normfree.model.activations import IN_THIS_FILE

    names = {model["activation"]} if isinstance(model["activation"], str) else set(model["activation"])
    of_ones_own = names - IN_THIS_FILE.keys()  # such an activation may read and learn slopes
    sloped = bool(of_ones_own) or "leaky_relu" in names
    learned = bool(of_ones_own) or model["learnable_slope"] != "none"
    rotary = model["position"] == "rotary"
    needs = {
        "model.rotary_share": (rotary, "model.position=rotary"),
        "model.rotary_base": (rotary, "model.position=rotary"),
        "model.norm_epsilon": ({model["norm"], model["final_norm"]} != {"none"}, "a norm"),
        "model.negative_slope": (sloped, "model.activation=leaky_relu"),
        "train.decay_slopes": (learned, "model.learnable_slope=per_layer or shared"),
        "train.slope_learning_rate_factor": (learned, "model.learnable_slope=per_layer or shared"),
    }
    given = {"model": model, "train": spec.to_dict()["train"]}
    default = {"model": NormFreeConfig().to_dict(), "train": TrainSpec(steps=1).__dict__}
    for key, (is_read, reader) in needs.items():
        part, _, name = key.partition(".")
        if not is_read and given[part][name] != default[part][name]:
            raise ValueError(f"{key}={given[part][name]} is read with {reader} only: leave it out")


def _declared_by(variant: str) -> dict[str, Any]:
    """What makes a variant; the value of a slope does not, a tag tells runs with other slopes apart."""
    model = yaml.safe_load((CONF / "variant" / f"{variant}.yaml").read_text(encoding="utf-8")).get("model", {})
    return {key: value for key, value in model.items() if key != "negative_slope"}


def _same(model: Mapping[str, Any], declared: Mapping[str, Any], key: str) -> bool:
    """Equal in every layer; `model` has every field of a NormFreeConfig."""
    if key != "activation":
        return model[key] == declared[key]
    asked = {**model, key: declared[key]}
    _stretch(asked, declared)
    one, other = (
        value if isinstance(value, list) else [value] * model["num_hidden_layers"] for value in (model[key], asked[key])
    )
    return one == other


def checked(overrides: Sequence[str]) -> list[str]:
    """The overrides, or ValueError for a key or a group member that does not exist."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is not of the form key=value")
        if key.startswith("hydra"):
            continue
        if key == "data.source":
            raise ValueError(f"{text!r} would leave how that text is cut at another source's setting; say data={value}")
        if key in GROUPS:
            for member in value.split(","):
                if member not in members(key):
                    raise ValueError(f"unknown {key} {member!r}; {nearest(member, members(key))}")
        elif key not in allowed_keys():
            raise ValueError(f"unknown key {key!r}; {_meant(key)}")
        try:
            OverridesParser.create().parse_override(text)
        except HydraException:
            quoted = "['...','...']" if value.startswith("[") else "'...'"
            raise ValueError(f'cannot read {text!r}; quote what has special characters: "{key}={quoted}"') from None
    return list(overrides)


_OTHER_NAMES = {
    "batch_size": "train.batch_sequences",
    "gradient_accumulation_steps": "train.micro_batch_sequences",
    "learning_rate": "train.peak_learning_rate",
    "lr": "train.peak_learning_rate",
    "max_steps": "train.steps",
}
"""What other programs call some keys."""


_FIXED = {
    ("optimizer", "optim"): "the optimiser is AdamW (train.adam_beta1, adam_beta2, adam_epsilon, weight_decay)",
    ("lr_scheduler", "lr_scheduler_type", "scheduler", "schedule"): (
        "the learning rate warms up and falls linearly (train.warmup_share, final_learning_rate; with that at the peak "
        "it is constant)"
    ),
}
"""What other programs let choose."""


def _meant(key: str) -> str:
    """The end of an error line on a key that does not exist."""
    if key == "workers":
        return "it is a key of `normfree study`"
    for names, what in _FIXED.items():
        if key.rpartition(".")[2] in names:
            return what
    last, allowed = key.rpartition(".")[2], allowed_keys()
    same = [known for known in allowed if known.rpartition(".")[2] == last]
    if named := [_OTHER_NAMES[last]] if last in _OTHER_NAMES else same:
        return f"did you mean {' or '.join(named)}?"
    found = nearest(key, allowed)
    return found if found.startswith("did you mean") else "`normfree train --help` has all of them"


def _single(overrides: list[str]) -> list[str]:
    """The overrides, or ValueError for one that is for several runs."""
    for text in overrides:
        if text.startswith("hydra"):
            raise ValueError(f"{text!r} is for many runs: `normfree train -m`")
        if OverridesParser.create().parse_override(text).is_sweep_override():
            raise ValueError(f"{text!r} is several values: `normfree train -m` trains one run for each")
    return overrides


def forced(override: str) -> str:
    """Let an override of a nested key add what the YAML leaves at its default, e.g. `++model.bias=all`."""
    key = override.partition("=")[0]
    return f"++{override}" if "." in key and not key.startswith("hydra") else override


def override(key: str, value: Any) -> str:
    """The override that gives `key` the value that a YAML file has, whatever characters it has."""
    if key in GROUPS or (key not in NAMES and isinstance(value, str) and _EXPONENT.fullmatch(value)):
        return f"{key}={value}"
    return f"{key}={_as_hydra_reads(value)}"


def _as_hydra_reads(value: Any) -> str:
    match value:
        case list():
            return f"[{','.join(map(_as_hydra_reads, value))}]"
        case str():
            return QuotedString(value, Quote.single).with_quotes()
        case None:
            return "null"
        case _:
            return str(value)


def members(group: str) -> list[str]:
    """The members of a configuration group, e.g. the presets; of `studies`, those that come with the package."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def defaults() -> dict[str, Any]:
    """The value of every dotted key that the configuration sets where a command gives none, e.g. `train.steps`."""
    with initialize_config_dir(str(CONF), version_base=None):
        values: Any = OmegaConf.to_container(compose("config"))
    found = {}
    for name, value in values.items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found


def describe_model_keys() -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every field of NormFreeConfig, read off its source: importing it loads torch."""
    source = (Path(__file__).parent / "model" / "configuration.py").read_text(encoding="utf-8")
    body = next(node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    rows = []
    for line, after in itertools.pairwise(body):
        match line:
            case ast.AnnAssign(ast.Name(name), annotation, ast.expr() as default):
                meaning = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else ""
                described = with_choices(meaning, _choices(annotation))
                rows.append((f"model.{name}", str(ast.literal_eval(default)), described))
    return rows


def _choices(annotation: ast.expr) -> list[str]:
    match annotation:
        case ast.Subscript(ast.Name("Literal"), ast.Tuple(values)):
            return [ast.literal_eval(value) for value in values]
    return []


def allowed_keys() -> list[str]:
    """Every key a user may set."""
    from normfree.model import NormFreeConfig  # loads torch, which --help and report do not need

    spec_keys = [key for key in known_keys() if key not in NOT_SET_ALONE]
    return [*GROUPS, *PLACES, *spec_keys, *(f"model.{name}" for name in NormFreeConfig.__annotations__)]
