"""Counts and prices of models, and perplexity against communication."""

import json
import math
from collections import Counter
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from normfree.analysis.groups import group_runs
from normfree.cost import families
from normfree.cost.constants import find_protocol, load_constants
from normfree.cost.counts import Matmul, count
from normfree.cost.families import SHAPES, read_architecture
from normfree.cost.totals import Point, of_config, pareto_front, trade_off
from normfree.model import conversion
from normfree.model.activations import ACTIVATIONS
from normfree.model.configuration import NormFreeConfig
from normfree.model.norms import NORMS
from normfree.model.tables import TABLES
from normfree.report.tables.cost import cost_markdown, cost_tables, trade_off_table
from normfree.store.runs import Run
from tests.synthetic import another_corpus, study, write_run


def elements(config: Any, context: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for item in count(read_architecture(config), context):
        counts[item.operation] += item.elements
    return counts


def small(**fields: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
    return {"model_type": "normfree", **sizes, "max_position_embeddings": 16, **fields}


LLAMA: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 96}


def test_gpt2_counts_by_hand() -> None:
    counts = elements(GPT2Config(), 128)
    assert counts["gelu_tanh"] == 12 * 128 * 3072
    assert counts["layernorm"] == 25 * 128 * 768
    assert counts["softmax"] == 12 * 12 * 128 * 128
    assert counts["matmul"] == 12 * 128 * (4 * 768 + 3072 + 768) + 128 * 50257
    assert counts["attention_product"] == 12 * 12 * (128 * 128 + 128 * 64)


def test_neox_rotates_a_quarter_and_has_the_erf_form() -> None:
    config = GPTNeoXConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256)
    counts = elements(config, 10)
    assert counts["gelu_erf"] == 2 * 10 * 256
    assert counts["public_product"] == 2 * 2 * 2 * 4 * 4 * 10  # layers, q and k, cos and sin, heads, 16 / 4, tokens
    old = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
    assert elements({**old, "rotary_pct": 0.25}, 10) == counts


def test_our_gated_part_costs_what_llamas_does() -> None:
    norms = {"norm": "rmsnorm", "final_norm": "rmsnorm", "query_key_norm": "none"}
    ours = small(feed_forward="gated", activation="silu", position="rotary", rotary_share=1.0, **norms)
    sizes = {"intermediate_size": 96, "max_position_embeddings": 16}
    assert elements(ours | sizes, 16) == elements(LlamaConfig(**small(**sizes)), 16)


def test_llama_has_gates_rms_norms_and_fewer_keys() -> None:
    config = LlamaConfig(**LLAMA)
    counts = elements(config, 10)
    assert counts["silu"] == counts["product"] == 2 * 10 * 96
    assert counts["rmsnorm"] == 5 * 10 * 64
    assert counts["softmax"] == 2 * 4 * 10 * 10  # one a query head
    # Layers, cosine and sine, heads that rotate, width, tokens.
    assert counts["public_product"] == 2 * 2 * (4 + 2) * 16 * 10
    products = [item for item in count(read_architecture(config), 10) if isinstance(item, Matmul) and item.layer == 0]
    assert [(item.batch, item.m, item.k, item.n) for item in products] == [
        (1, 10, 64, 64 + 2 * 32),  # queries, and half as many keys and values
        (4, 10, 16, 10),
        (4, 10, 10, 16),
        (1, 10, 64, 64),
        (1, 10, 64, 2 * 96),
        (1, 10, 96, 64),
    ]


@pytest.mark.parametrize("kind", [transformers.MistralConfig, transformers.Qwen2Config])
def test_mistral_and_qwen2_cost_what_llama_costs(kind: Any) -> None:
    assert elements(kind(**LLAMA), 10) == elements(LlamaConfig(**LLAMA), 10)
    assert of_config(kind(**LLAMA), context=10).name == kind.model_type


def test_gemma2_has_four_norms_a_layer_and_capped_scores() -> None:
    config = transformers.Gemma2Config(**LLAMA | {"num_hidden_layers": 3, "head_dim": 32})
    capped = elements(config, 10)
    assert capped["rmsnorm"] == (3 * 4 + 1) * 10 * 64
    assert capped["gelu_tanh"] == capped["product"] == 3 * 10 * 96
    assert capped["public_product"] == 3 * 2 * (4 + 2) * 32 * 10
    assert capped["silu"] == 3 * 4 * 10 * 10 + 10 * 100  # the price of a soft cap
    config.attn_logit_softcapping = config.final_logit_softcapping = None
    assert elements(config, 10) == capped - Counter(silu=capped["silu"])


PARAMETERS = {  # of the model cards; llama-7b: of the released weights
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "llama-7b": 6_738_415_616,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    fields = dict(SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    assert model.num_parameters() == PARAMETERS[name]
    assert read_architecture(fields) == read_architecture(model.config)


def test_leaky_relu_is_a_relu_and_a_product() -> None:
    leaky = [small(activation="leaky_relu", learnable_slope=kind) for kind in ("none", "shared")]
    fixed, learnt = (elements(model, 16) for model in leaky)
    assert fixed["relu"] == learnt["relu"] == fixed["public_product"] == learnt["product"] == 3 * 16 * 256
    relu, public, secret = (of_config(model, context=16).bytes for model in (small(activation="relu"), *leaky))
    assert relu < public < secret


def test_identity_and_no_norm_are_the_only_free_choices() -> None:
    mixed = elements(small(activation=("relu", "identity", "gelu")), 16)
    assert mixed["relu"] == mixed["gelu_erf"] == 16 * 256
    counts = elements(small(norm="none", final_norm="none", activation="identity"), 16)
    assert set(counts) == {"embedding", "matmul", "attention_product", "softmax"}


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "layer_norm_epsilon"), ("gpt_neox", "layer_norm_eps")])
def test_a_layernorm_with_a_huge_epsilon_is_free(kind: str, name: str) -> None:
    config = {"gpt2": GPT2Config, "gpt_neox": GPTNeoXConfig}[kind]()
    assert "layernorm" in elements(config, 16)
    setattr(config, name, families.NORM_FREE_EPSILON)
    assert "layernorm" not in elements(config, 16)
    assert conversion.NORM_FREE_EPSILON == families.NORM_FREE_EPSILON


def test_defaults_are_those_of_the_config() -> None:
    config = NormFreeConfig()
    for key, value in families.NORMFREE_DEFAULTS.items():
        assert getattr(config, key) == (4 * config.hidden_size if key == "intermediate_size" else value)
    assert elements({"model_type": "normfree"}, 128) == elements(config, 128)


def test_every_choice_of_the_model_has_a_price_with_origin() -> None:
    assert ACTIVATIONS.keys() <= {*families.ACTIVATIONS, "leaky_relu"}
    assert {*families.NORMFREE_NORMS, "taper", "fake"} == set(NORMS)  # a config does not say whether it tapered off
    for name, free in families.NORMFREE_FREE.items():
        assert set(free) <= set(TABLES.get(name) or get_args(NormFreeConfig.__annotations__[name]))
    constants = load_constants()
    for protocol, name in ((p, n) for p in constants["protocols"] for n in ACTIVATIONS):
        assert of_config(small(activation=name), context=16, protocol=protocol).rounds > 0
    cheetah, semi2k = (constants["protocols"][name]["operations"] for name in ("cheetah", "semi2k"))
    assert set(cheetah) == set(semi2k)
    assert {price["origin"] for price in [*cheetah.values(), *semi2k.values()]} <= constants["origins"].keys()


def test_semi2k_prices_are_what_the_simulator_logged() -> None:
    """SPU 0.9.5: (128 x 768)(768 x 1536) sends 11,010,048 bytes each way in 2 rounds. The softmax of rows of 128 takes
    119 rounds, of rows of 768 143."""
    item = Matmul(layer=0, part="", operation="matmul", batch=1, m=128, k=768, n=1536)
    assert find_protocol("semi2k").price(item) == (2 * 11_010_048, 2)
    with pytest.raises(ValueError, match="no price for 'mat_mul'; did you mean matmul"):
        find_protocol("semi2k").price(replace(item, operation="mat_mul"))
    config = {**small(norm="none", final_norm="none", activation="identity"), "max_position_embeddings": 768}
    short, long = (of_config(config, context=context).rounds for context in (128, 768))
    assert long - short == 3 * (143 - 119)


def test_bound_of_time_charges_half_the_bytes_and_every_round() -> None:
    price = of_config(small(), context=16, network="lan", bandwidth_mbps=8, delay_ms=1000)
    assert price.seconds_at_least == pytest.approx(price.bytes / 2 / 1e6 + price.rounds)
    assert of_config(small(), context=16).network.bandwidth_mbps == 100


def test_tables_add_up() -> None:
    price = of_config(GPT2Config())
    *tables, products = cost_tables(price)
    for table in tables:
        *rows, total = table.rows
        assert sum(int(row[-1]) for row in rows) == int(total[-1]) == price.rounds
        assert sum(float(row[-3]) for row in rows) == pytest.approx(price.bytes / 1e9, rel=0.002)
        assert sum(float(row[-2]) for row in rows) == pytest.approx(100, abs=0.05 * len(rows))
    shapes = {row[0]: row[1] for row in products.rows}
    assert shapes.pop("1 x (128 x 50257)(50257 x 768)") == shapes.pop("1 x (128 x 768)(768 x 50257)") == "1"
    assert len(shapes) == 6
    assert set(shapes.values()) == {"12"}
    text = cost_markdown(price)
    assert "for network traffic alone on wan (100 Mbps each way, 40 ms one way); computing is extra." in text
    assert price.assumptions in text


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (small(), {"protocol": "cheeta"}, "did you mean cheetah"),
        (small(), {"network": "wam"}, "did you mean wan"),
        (small(), {"context": 17}, "context=17 must be 1 to 16"),
        (small(), {"bandwidth_mbps": 0}, "bandwidth_mbps=0"),
        (small(activation="geluu"), {}, "'geluu' has no known cost; did you mean gelu"),
        (small(norm="taper"), {}, "norm='taper' has no known cost"),
        (small(attention_sink="learned"), {}, "attention_sink='learned' has no known cost"),
        (small(position="rotatory"), {}, "position='rotatory' has no known cost; only position=learned or rotary"),
        (GPT2Config(activation_function="tanh"), {}, "activation='tanh' has no known cost"),
        (transformers.OPTConfig(), {}, "no cost for models of type 'opt'"),
        ({"model_type": "llama", "hidden_size": 8}, {}, "has no field 'num_hidden_layers'"),
        (GPT2Config(add_cross_attention=True), {}, "add_cross_attention=True has no known cost"),
        (small(activation=["relu", "gelu"]), {}, "lists 2 names, but num_hidden_layers is 3"),
        (GPT2Config().to_dict() | {"n_embd": 100}, {}, "hidden_size=100 must be a multiple of num_attention_heads=12"),
    ],
)
def test_unknown_input_is_refused_by_name(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_config(config, **{"context": 16, **options})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("protocols.cheetah.operations.relu", {"rounds": 1}, "price of cheetah.relu has no 'bytes_per_element'"),
        ("networks.wan", {"bandwidth_mbps": 100}, "delay_ms is missing"),
        ("version", 7, r"cannot be read \(version 7, not 1\)"),
    ],
)
def test_a_wrong_part_of_a_file_is_named(place: str, value: Any, message: str, tmp_path: Path) -> None:
    content, file = load_constants(), tmp_path / "mine.json"
    *outer, last = place.split(".")
    reduce(dict.__getitem__, outer, content)[last] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        of_config(small(activation="relu"), context=16, constants=file)


@pytest.mark.parametrize(
    ("fields", "operations"),
    [
        ({"norm": "rmsnorm"}, {("norm", "rmsnorm"): 8}),
        ({"norm": "layernorm", "placement": "peri"}, {("norm", "layernorm"): 16}),
        ({"norm": "dyt"}, {("norm", "product"): 8, ("norm", "silu"): 8}),
        ({"norm": "none", "final_norm": "derf"}, {("final norm", "product"): 1, ("final norm", "gelu_erf"): 1}),
        ({"norm": "none", "query_key_norm": "rmsnorm", "branch": "fixed"}, {("query and key norm", "rmsnorm"): 4}),
    ],
)
def test_norms_are_counted_where_they_sit(fields, operations):
    model = read_architecture({"model_type": "normfree", "num_hidden_layers": 4, **fields})
    counts = Counter((item.part, item.operation) for item in count(model, 16))
    assert {key: counts[key] for key in operations} == operations
    of_norms = [{key: n for key, n in each.items() if key[0] == "norm"} for each in (counts, operations)]
    assert of_norms[0] == of_norms[1]


def points_of(runs: list[Run], *, mix: bool = False) -> list[Point]:
    return trade_off(group_runs(runs, mix=mix))[0]


def test_front_by_hand() -> None:
    points = [(3.0, 9.0), (2.9, 25.0), (3.2, 7.0), (3.2, 7.0), (3.3, 7.0), (3.2, 23.0), (math.nan, 1.0)]
    assert pareto_front(points) == [True, True, True, True, False, False, False]


def test_a_study_becomes_points_cheapest_first(tmp_path: Path) -> None:
    points = {point.name: point for point in points_of(study(tmp_path))}
    assert next(iter(points)) == "SM"
    assert points["SM+R"].bytes < points["SM+LN+R"].bytes < points["SM+G"].bytes < points["SM+LN+G"].bytes
    assert points["SM+R"].seeds == 1
    assert points["SM+R"].on_front
    assert math.isnan(points["SM"].perplexity)  # one of its seeds diverged
    assert not points["SM"].on_front


def test_variants_are_compared_on_common_seeds(tmp_path: Path) -> None:
    """Fewer and luckier seeds put no variant onto the front."""
    runs = [write_run(tmp_path, "SM+R", seed=seed, perplexity=ppl) for seed, ppl in enumerate((34.0, 33.0, 32.0))]
    runs += [write_run(tmp_path, "SM+G", seed=0, perplexity=33.5)]
    points = {point.name: point for point in points_of(runs)}
    values = {name: (point.perplexity, point.seeds) for name, point in points.items()}
    assert values == {"SM+R": (34.0, 1), "SM+G": (33.5, 1)}
    assert points["SM+G"].on_front


def test_the_order_of_operations_changes_no_bit(tmp_path: Path) -> None:
    """ReLU in one half and GELU in the other: only the better of the two hybrids is on the front."""
    runs = []
    for label, perplexity, names in (("SM+R/G", 32.0, ["relu", "gelu"]), ("SM+G/R", 34.0, ["gelu", "relu"])):
        activation = [name for name in names for _ in range(6)]
        model = {"num_hidden_layers": 12, "norm": "none", "activation": activation}
        runs.append(write_run(tmp_path, label, perplexity=perplexity, model=model))
    better, worse = sorted(points_of(runs), key=lambda point: point.perplexity)
    assert better.bytes == worse.bytes
    assert (better.on_front, worse.on_front) == (True, False)


def test_each_corpus_has_a_front_of_its_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM+R", perplexity=34.0)]
    runs += [write_run(tmp_path, "SM+R", study="other", perplexity=3.0, facts=another_corpus("decaf" * 8))]
    assert [point.on_front for point in points_of(runs, mix=True)] == [True, True]


def test_a_group_without_a_price_has_no_point(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, label) for label in ("SM+LN+G", "SM+G", "SM+R")]
    runs.append(write_run(tmp_path, "SM+R2", model={"activation": "squared_relu"}))
    table = trade_off_table(group_runs(runs))
    assert {row[0]: row[-1] for row in table.rows} == {"SM+R": "yes", "SM+G": "no", "SM+LN+G": "yes"}
    assert "SM+R2 is left out: an operation of it has no price." in table.notes
