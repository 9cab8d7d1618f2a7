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
    parts = table["parts"] | table["activations"]
    first, *codes = name.split("-")
    unknown = [code for code in codes if code not in parts]
    if first != "sm" or unknown:
        part = f"; part {unknown[0]!r}: {nearest(unknown[0], [*parts])}" if first == "sm" else ""
        raise ValueError(f"unknown variant {name!r}; {nearest(name, [*MAIN, *files])}{part}")
    label, model, set_by = table["sm"]["label"], table["sm"]["model"], {}
    for code in codes:
        label += f"+{parts[code]['label']}"
        for field, value in parts[code]["model"].items():
            if field in set_by:
                raise ValueError(f"variant={name}: {set_by[field]} and {code} both set model.{field}; leave one out")
            set_by[field], model[field] = code, value
    if codes != (ordered := [code for code in parts if code in codes]):
        raise ValueError(f"variant={name}: parts have an order: give variant={'-'.join(['sm', *ordered])}")
    return {"variant": name, "label": label, "model": model}


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

    config, defaults = NormFreeConfig(**spec.model), NormFreeConfig()
    if spec.train.steps:
        norms.check_removal(config, spec.train.steps)
    family, used_norms, used_activations = config.family, {config.norm, config.final_norm}, {*config.layer_activations}
    # What a user registered may read and learn whatever it likes.
    own_activation = bool(used_activations - activations.IN_THIS_FILE.keys())
    own_norm = bool(used_norms - norms.IN_THIS_FILE.keys())
    divides = not {*used_norms, config.query_key_norm} <= {"none", "dyt", "derf"}
    squashes = not used_norms <= {"none", "layernorm", "rmsnorm", "lns", "bhyt", "taper", "fake"}
    learns_slopes = own_activation or config.learnable_slope != "none"
    masks_spans = family == "encoder_decoder" and spec.data.packing != "docstring"
    variance = own_norm or config.final_norm in ("layernorm", "lns", "fake")
    readers = (
        ("image_size patch_size num_channels pooling", family == "vision", "model.family=vision"),
        ("noise_share span_tokens span_seed", masks_spans, "masked spans (model.family=encoder_decoder)"),
        ("decoder_start_token_id", family == "encoder_decoder", "model.family=encoder_decoder"),
        ("target_tokens", False, "data.packing=docstring, which sets it,"),
        ("relative_buckets relative_distance", config.position == "relative", "model.position=relative"),
        ("tie_word_embeddings", family != "vision", "a family of text"),
        ("output_bias", family == "decoder", "model.family=decoder"),
        ("rotary_share rotary_base", config.position == "rotary", "model.position=rotary"),
        ("norm_epsilon", divides, "a norm that divides"),
        ("norm_steepness", squashes, "model.norm=dyt or derf"),
        ("taper_start_step taper_end_step", own_norm or config.norm == "taper", "model.norm=taper"),
        ("fake_start_step fake_gap_steps", own_norm or config.norm == "fake", "model.norm=fake"),
        ("placement", config.norm != "none", "a norm"),
        ("post_share", config.placement == "mix", "model.placement=mix"),
        ("linear_groups", config.linear != "plain", "model.linear=weight_norm or spectral_norm"),
        ("negative_slope", own_activation or "leaky_relu" in used_activations, "model.activation=leaky_relu"),
        ("decay_slopes slope_learning_rate_factor", learns_slopes, "model.learnable_slope=per_layer or shared"),
        ("sigma_weight", variance, "model.final_norm=layernorm, lns or fake"),
    )
    for names, is_read, reader in readers:
        for name in names.split():
            of_model = "model", config, defaults
            part, owner, default = of_model if hasattr(config, name) else ("train", spec.train, type(spec.train))
            if not is_read and (value := getattr(owner, name)) != getattr(default, name):
                raise ValueError(f"{part}.{name}={value} is read with {reader} only: leave it out")


def spread_over_layers(names: str | list[str], layers: int) -> list[str]:
    """The activation of each layer: each name takes an equal part of the layers, the first ones one more."""
    names = [names] if isinstance(names, str) else names
    return [names[layer * len(names) // layers] for layer in range(layers)]
