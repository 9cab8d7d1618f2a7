"""Variants by name: composed of parts, and their labels."""

import pytest

from normfree.spec.compose import CONF, compose_run, variants
from normfree.spec.variants import part_names, read_variant

PARTS = part_names(CONF / "variant")


@pytest.mark.parametrize(
    ("name", "label", "fields"),
    [
        ("sm", "SM", {"norm": "none", "activation": "identity"}),
        ("sm-ln-g", "SM+LN+G", {"norm": "layernorm", "activation": "gelu"}),
        ("sm-rg", "SM+R/G", {"norm": "none", "activation": ["relu", "gelu"]}),
        (
            "sm-dyt-scale-g",
            "SM+DyT+scale+G",
            {"norm": "dyt", "final_norm": "dyt", "embedding_scale": "learned", "activation": "gelu"},
        ),
        ("sm-rms-peri-r", "SM+RMS+peri+R", {"norm": "rmsnorm", "final_norm": "rmsnorm", "placement": "peri"}),
    ],
)
def test_a_name_is_composed_of_parts(name, label, fields):
    variant = read_variant(name, CONF / "variant")
    assert variant["label"] == label
    assert fields.items() <= variant["model"].items()


@pytest.mark.parametrize("part", PARTS["parts"])
def test_every_part_trains_as_a_variant(part):
    needs = {
        "taper": ["model.taper_end_step=9"],
        "fake": ["model.fake_start_step=9"],
        "post": ["ln"],
        "peri": ["ln"],
        "mix": ["ln"],
    }.get(part, [])
    words = [word for word in needs if "=" in word]
    name = "-".join(["sm", *(word for word in needs if "=" not in word), part, "r"])
    spec = compose_run([f"variant={name}", *words]).spec
    assert spec.label.startswith("SM+")
    assert spec.name == f"{name}-seed0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sm-g-ln", "parts have an order: give variant=sm-ln-g"),
        ("sm-ln-rms-g", "ln and rms both set model.norm; leave one out"),
        ("sm-g-r", "g and r both set model.activation"),
        ("sm-lnn-g", "unknown variant 'sm-lnn-g'; did you mean sm-ln-g"),
        ("ln-g", "unknown variant 'ln-g'"),
    ],
)
def test_a_wrong_name_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        compose_run([f"variant={name}"])


@pytest.mark.parametrize("words", [["model.placement=post"], ["model.final_norm=none"], ["model.attention_gate=head"]])
def test_a_choice_that_the_label_lacks_is_refused(words):
    with pytest.raises(ValueError, match="would have the wrong label: use variant=custom"):
        compose_run(["variant=sm-ln-g", *words])


def test_variants_that_help_shows_exist():
    assert {"sm-ln-g", "sm-gr", "leaky-shared", "custom"} <= set(variants())
