"""Variants by name: composed of parts, and their labels."""

import pytest

from normfree.spec.compose import compose_run
from normfree.spec.variants import part_names, read_variant

PARTS = part_names()


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
    variant = read_variant(name)
    assert variant["label"] == label
    assert fields.items() <= variant["model"].items()


@pytest.mark.parametrize("part", PARTS["parts"])
def test_every_part_trains_as_a_variant(part):
    words = {"taper": ["model.taper_end_step=9"], "fake": ["model.fake_start_step=9"]}.get(part, [])
    name = f"sm-ln-{part}-r" if part in ("post", "peri", "mix") else f"sm-{part}-r"
    spec = compose_run([f"variant={name}", *words]).spec
    assert spec.label.startswith("SM+")
    assert spec.name == f"{name}-seed0"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("variant=sm-rg model.num_hidden_layers=12", ["relu"] * 6 + ["gelu"] * 6),
        ("variant=sm-rg model.num_hidden_layers=5", ["relu"] * 3 + ["gelu"] * 2),
        ("variant=sm-gr preset=pythia70m-t128", ["gelu"] * 3 + ["relu"] * 3),
        ("variant=sm-rg model.num_hidden_layers=2 model.activation=[relu,gelu] model.norm=none", ["relu", "gelu"]),
        ("variant=sm-g model.num_hidden_layers=2 model.activation=[gelu,gelu] model.norm=none", ["gelu"] * 2),
    ],
)
def test_half_and_half_fits_any_depth_or_is_spelled_out(words, names):
    assert compose_run(words.split()).spec.model["activation"] == names
