"""Variants: composed of parts, checked against their label; and a check that every setting has an effect."""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from normfree.spec.keys import nearest
from normfree.spec.run import LABEL_FIELDS, RunSpec

CONF = Path(__file__).parent / "conf"
Fields = Mapping[str, Any]


def model_fields(fields: dict[str, Any], declared: Fields) -> dict[str, Any]:
    """The model's fields in the form that runs record: an activation per layer, and 1 as 1.0 where a float belongs."""
    from normfree.model import NormFreeConfig

    names, layers = fields.get("activation"), fields["num_hidden_layers"]
    if isinstance(names, list) and names == declared.get("activation") and isinstance(layers, int):
        fields = fields | {"activation": spread_over_layers(names, layers)}
    config = NormFreeConfig(**fields)
    return {name: float(value) if isinstance(getattr(config, name), float) else value for name, value in fields.items()}


MAIN = ("sm-ln-g", "sm-ln-r", "sm-g", "sm-r", "sm-ln", "sm", "sm-rg", "sm-gr")
"""Composed variants that help and advice name; any other order-preserving choice of parts works too."""


def read_variant(name: str) -> dict[str, Any]:
    """A variant's name, label and fields of the model: a file, or composed of the parts in parts.yaml.

    Raises ValueError for a name that is neither, or whose parts contradict each other or stand in another order.
    """
    if name in (files := sorted(path.stem for path in (CONF / "variant").glob("*.yaml"))):
        return read_yaml(CONF / "variant" / f"{name}.yaml")
    table = read_yaml(CONF / "parts.yaml")
    parts, activations = table["parts"], table["activations"]
    first, *codes = name.split("-")
    unknown = [code for code in codes if code not in parts | activations]
    if first != "sm" or unknown:
        part = f"; part {unknown[0]!r}: {nearest(unknown[0], [*parts, *activations])}" if first == "sm" else ""
        raise ValueError(f"unknown variant {name!r}; {nearest(name, [*MAIN, *files])}{part}")
    entries = [table["sm"], *((parts | activations)[code] for code in codes)]
    ordered = [code for code in [*parts, *activations] if code in codes]
    model: dict[str, Any] = dict(table["sm"]["model"])
    set_by: dict[str, str] = {}
    for code, entry in zip(codes, entries[1:], strict=True):
        for field, value in entry["model"].items():
            if field in set_by:
                raise ValueError(f"variant={name}: {set_by[field]} and {code} both set model.{field}; leave one out")
            set_by[field], model[field] = code, value
    if codes != ordered:
        raise ValueError(f"variant={name}: parts have an order: give variant={'-'.join(['sm', *ordered])}")
    return {"variant": name, "label": "+".join(entry["label"] for entry in entries), "model": model}


def part_names() -> dict[str, list[str]]:
    """What `read_variant` composes names of: `parts` in their order, and `activations`."""
    table = read_yaml(CONF / "parts.yaml")
    return {kind: list(table[kind]) for kind in ("parts", "activations")}


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a file of `conf`, read once: a study composes each of its runs of the same files."""
    return deepcopy(_load(path))


@cache
def _load(path: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path))


def check_label(spec: RunSpec, variants: Mapping[str, Fields]) -> None:
    """Raises ValueError for a model that is not its variant's: tables and published numbers go by the label.

    `variants`: the fields of this variant, and of others to recommend.
    """
    from normfree.model import NormFreeConfig

    if spec.variant == "custom":
        if missing := [f"model.{key}" for key in ("norm", "activation") if key not in spec.model]:
            raise ValueError(f"variant=custom needs {' and '.join(missing)}, e.g. model.norm=none")
        return
    config, default = NormFreeConfig(**spec.model), NormFreeConfig()
    actual = config.to_dict() | {"activation": config.layer_activations}

    def differing_keys(variant: str) -> list[str]:
        declared = {name: getattr(default, name) for name in LABEL_FIELDS} | dict(variants[variant])
        declared["activation"] = spread_over_layers(declared["activation"], config.num_hidden_layers)
        return [name for name in LABEL_FIELDS if actual[name] != declared[name]]

    if not (differing := differing_keys(spec.variant)):
        return
    fitting = [name for name in variants if not differing_keys(name)]
    advice = f"use variant={fitting[0]}" if fitting else "use variant=custom, with a tag that names it"
    settings = ", ".join(f"model.{key}={getattr(config, key)!r}" for key in differing)
    raise ValueError(f"variant={spec.variant} with {settings} would have the wrong label: {advice}")


def check_fields_are_read(spec: RunSpec) -> None:
    """Raises ValueError for a setting, other than the default, that nothing reads, and norms that leave too late."""
    from normfree.model import NormFreeConfig, activations, norms

    config = NormFreeConfig(**spec.model)
    if spec.train.steps:
        norms.check_removal(config, spec.train.steps)
    names, used_norms = set(config.layer_activations), {config.norm, config.final_norm}
    # What a user registered may read and learn whatever it likes.
    own_activation = bool(names - activations.IN_THIS_FILE.keys())
    own_norm = bool(used_norms - norms.IN_THIS_FILE.keys())
    rotary = config.position == "rotary", "model.position=rotary"
    vision, decoder, pairs = (
        (config.family == name, f"model.family={name}") for name in ("vision", "decoder", "encoder_decoder")
    )
    spans = pairs[0] and spec.data.packing != "docstring", "masked spans (model.family=encoder_decoder)"
    relative = config.position == "relative", "model.position=relative"
    learned = own_activation or config.learnable_slope != "none", "model.learnable_slope=per_layer or shared"
    tapers = own_norm or config.norm == "taper", "model.norm=taper"
    removes = own_norm or config.norm == "fake", "model.norm=fake"
    squashing, dividing = {"dyt", "derf"}, {"layernorm", "rmsnorm", "lns", "bhyt", "taper", "fake"}
    needs = {
        **dict.fromkeys(("image_size", "patch_size", "num_channels", "pooling"), vision),
        **dict.fromkeys(("noise_share", "span_tokens", "span_seed"), spans),
        "decoder_start_token_id": pairs,
        "target_tokens": (False, "data.packing=docstring, which sets it,"),
        **dict.fromkeys(("relative_buckets", "relative_distance"), relative),
        "tie_word_embeddings": (not vision[0], "a family of text"),
        "output_bias": decoder,
        **dict.fromkeys(("rotary_share", "rotary_base"), rotary),
        "norm_epsilon": (not {*used_norms, config.query_key_norm} <= {"none", *squashing}, "a norm that divides"),
        "norm_steepness": (not used_norms <= {"none", *dividing}, "model.norm=dyt or derf"),
        **dict.fromkeys(("taper_start_step", "taper_end_step"), tapers),
        **dict.fromkeys(("fake_start_step", "fake_gap_steps"), removes),
        "placement": (config.norm != "none", "a norm"),
        "post_share": (config.placement == "mix", "model.placement=mix"),
        "linear_groups": (config.linear != "plain", "model.linear=weight_norm or spectral_norm"),
        "negative_slope": (own_activation or "leaky_relu" in names, "model.activation=leaky_relu"),
        **dict.fromkeys(("decay_slopes", "slope_learning_rate_factor"), learned),
        "sigma_weight": (
            own_norm or config.final_norm in ("layernorm", "lns", "fake"),
            "model.final_norm=layernorm, lns or fake",
        ),
    }
    defaults = NormFreeConfig()
    for name, (is_read, reader) in needs.items():
        part, owner, default = (
            ("model", config, defaults) if hasattr(config, name) else ("train", spec.train, type(spec.train))
        )
        if not is_read and (value := getattr(owner, name)) != getattr(default, name):
            raise ValueError(f"{part}.{name}={value} is read with {reader} only: leave it out")


def spread_over_layers(names: str | list[str], layers: int) -> list[str]:
    """The activation of each layer: each name takes an equal part of the layers, the first ones one more."""
    names = [names] if isinstance(names, str) else names
    return [names[layer * len(names) // layers] for layer in range(layers)]
