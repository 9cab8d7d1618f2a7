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
        ("sm-dyt-scale-g", "SM+DyT+scale+G", {"norm": "dyt", "final_norm": "dyt", "embedding_scale": "learned"}),
        ("sm-rms-peri-r", "SM+RMS+peri+R", {"norm": "rmsnorm", "final_norm": "rmsnorm", "placement": "peri"}),
    ],
)
def test_a_name_is_composed_of_parts(name, label, fields):
    variant = read_variant(name, CONF / "variant")
    assert variant["label"] == label
    assert fields.items() <= variant["model"].items()


@pytest.mark.parametrize("part", PARTS["parts"])
def test_every_part_trains_as_a_variant(part):
    words = {"taper": ["model.taper_end_step=9"], "fake": ["model.fake_start_step=9"]}.get(part, [])
    name = f"sm-ln-{part}-r" if part in ("post", "peri", "mix") else f"sm-{part}-r"
    spec = compose_run([f"variant={name}", *words]).spec
    assert spec.label.startswith("SM+")
    assert spec.name == f"{name}-seed0"


def test_variants_that_help_shows_exist():
    assert {"sm-ln-g", "sm-gr", "leaky-shared", "custom"} <= set(variants())
