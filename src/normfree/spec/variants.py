"""Checks that a model is the variant it is labelled as, and that every setting has an effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normfree.spec.run import RunSpec

Fields = Mapping[str, Any]


def model_fields(fields: dict[str, Any], declared: Fields) -> dict[str, Any]:
    """The model's fields in the form that runs record: an activation per layer, and 1 as 1.0 where a float belongs.

    Raises ValueError where `NormFreeConfig` refuses them.
    """
    from normfree.model import NormFreeConfig

    names, layers = fields.get("activation"), fields["num_hidden_layers"]
    if isinstance(names, list) and names == declared.get("activation") and isinstance(layers, int):
        fields = fields | {"activation": spread_over_layers(names, layers)}
    config = NormFreeConfig(**fields)
    return {name: float(value) if isinstance(getattr(config, name), float) else value for name, value in fields.items()}


def check_label(spec: RunSpec, variants: Mapping[str, Fields]) -> None:
    """Raises ValueError for a model that is not its variant's: tables and published numbers go by the label."""
    from normfree.model import NormFreeConfig

    if spec.variant == "custom":
        if missing := [f"model.{key}" for key in ("norm", "activation") if key not in spec.model]:
            raise ValueError(f"variant=custom needs {' and '.join(missing)}, e.g. model.norm=none")
        return
    config = NormFreeConfig(**spec.model)
    actual = config.to_dict() | {"activation": config.layer_activations}

    def differing_keys(variant: str) -> list[str]:
        declared = dict(variants[variant])
        declared["activation"] = spread_over_layers(declared["activation"], config.num_hidden_layers)
        return [key for key, value in declared.items() if actual[key] != value]

    if not (differing := differing_keys(spec.variant)):
        return
    fitting = [name for name in variants if not differing_keys(name)]
    advice = f"use variant={fitting[0]}" if fitting else "use variant=custom, with a tag that names it"
    settings = ", ".join(f"model.{key}={getattr(config, key)!r}" for key in differing)
    raise ValueError(f"variant={spec.variant} with {settings} would have the wrong label: {advice}")


def check_fields_are_read(spec: RunSpec) -> None:
    """Raises ValueError for a setting, other than the default, that nothing in this model reads."""
    from normfree.model import NormFreeConfig
    from normfree.model.activations import IN_THIS_FILE

    config = NormFreeConfig(**spec.model)
    names = set(config.layer_activations)
    registered_by_user = bool(names - IN_THIS_FILE.keys())  # such an activation may read and learn slopes
    rotary = config.position == "rotary", "model.position=rotary"
    learned = registered_by_user or config.learnable_slope != "none", "model.learnable_slope=per_layer or shared"
    needs = {
        "rotary_share": rotary,
        "rotary_base": rotary,
        "norm_epsilon": ({config.norm, config.final_norm} != {"none"}, "a norm"),
        "negative_slope": (registered_by_user or "leaky_relu" in names, "model.activation=leaky_relu"),
        "decay_slopes": learned,
        "slope_learning_rate_factor": learned,
    }
    for name, (is_read, reader) in needs.items():
        part, owner = ("model", config) if hasattr(config, name) else ("train", spec.train)
        if not is_read and (value := getattr(owner, name)) != getattr(type(owner), name):
            raise ValueError(f"{part}.{name}={value} is read with {reader} only: leave it out")


def spread_over_layers(names: str | list[str], layers: int) -> list[str]:
    """The activation of each layer: each name takes an equal part of the layers, the first ones one more."""
    names = [names] if isinstance(names, str) else names
    return [names[layer * len(names) // layers] for layer in range(layers)]
