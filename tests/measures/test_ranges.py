"""Ranges of inputs against numpy on inputs that the tests store themselves."""

import copy
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from normfree import measure
from normfree.entropy.routing import AttentionCall
from normfree.measures import scores
from normfree.measures.histogram import float_counts, quantiles
from tests.entropy.families import tiny_model
from tests.entropy.kinds import inputs_of, tiny_kind
from tests.measures.families import recorded
from tests.small_model import small_model

IDS = torch.arange(96).view(8, 12) % 20
WITHIN = 2**-8
SHARES = {"low": 1e-4, "high": 1 - 1e-4}


def check(measured: Any, site: str, values_of_layer: list[np.ndarray]) -> None:
    """The four numbers of a site against numpy; scores are rounded to float32 in another order."""
    for layer, values in enumerate(values_of_layer):
        near = {"rel": 2e-5, "abs": 2e-6} if site == "softmax_input" else {"rel": 1e-12}
        numbers = {name: np.atleast_1d(measured[f"{site}_{name}"])[layer] for name in ("min", "max", *SHARES)}
        assert numbers["min"] == pytest.approx(values.min(), **near)
        assert numbers["max"] == pytest.approx(values.max(), **near)
        for name, share in SHARES.items():
            expected = np.quantile(values, share, method="inverted_cdf")
            assert numbers[name] == pytest.approx(expected, rel=WITHIN + 1e-4)


def softmax_inputs(model: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What the softmax of each layer of the eager twin reads, without what its mask hides."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    softmax, read = nn.functional.softmax, []

    def reading(value: Tensor, *args: Any, **named: Any) -> Tensor:
        read.append(value.double().flatten().numpy())
        return softmax(value, *args, **named)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "softmax", reading)
        twin(**inputs)
    return [values[values > -1e30] for values in read]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_scores_are_those_that_eager_softmax_reads(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    measured = measure(model, IDS, ["logits", "ranges"], batch=3)
    check(measured, "softmax_input", softmax_inputs(model, {"input_ids": IDS}, monkeypatch))
    assert measured["softmax_input_max"] == pytest.approx(measured["max_logit"].max(1))


@pytest.mark.parametrize("kind", ["bert", "vit", "t5"])
def test_scores_of_encoders_are_those_that_softmax_reads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_kind(kind)
    inputs = {name: value for name, value in inputs_of(model).items() if "mask" not in name}
    measured = measure(model, inputs, "ranges")
    expected = softmax_inputs(model, inputs, monkeypatch)
    if kind == "t5":  # the decoder's layers alternate
        assert measured.layers["softmax_input_min"][-2:] == ["cross 0", "cross 1"]
        assert np.isnan(measured["activation_input_max"][-2:]).all()
        expected = [expected[place] for place in (0, 1, 2, 4, 3, 5)]
    check(measured, "softmax_input", expected)


@pytest.mark.parametrize("norm", ["layernorm", "dyt"])
@pytest.mark.parametrize("residual", ["sequential", "parallel"])
def test_norms_and_activations_of_our_model_are_stored_inputs(norm: str, residual: str) -> None:
    model = small_model(norm=norm, final_norm="rmsnorm", residual=residual)
    blocks = list(model.model.layers)
    check_sites(
        model,
        attention_norm_input=[block.attention_norm for block in blocks],
        feed_forward_norm_input=[block.feed_forward_norm for block in blocks],
        activation_input=[block.feed_forward.activation for block in blocks],
        final_norm_input=[model.model.final_norm],
    )


def check_sites(model: Any, **parts: list[Any]) -> Any:
    """Measure ranges and compare those of each site with the inputs of its modules."""
    values = recorded(model, {"input_ids": IDS}, before=[*chain(*parts.values())])
    measured = measure(model, IDS, "ranges", batch=3)
    for site, modules in parts.items():
        check(measured, site, [values[module] for module in modules])
    return measured


def test_norms_of_other_families_are_named_for_what_they_feed() -> None:
    llama, bert = tiny_model("llama"), tiny_kind("bert")
    blocks = list(llama.model.layers)
    check_sites(
        llama,
        attention_norm_input=[block.input_layernorm for block in blocks],
        feed_forward_norm_input=[block.post_attention_layernorm for block in blocks],
        activation_input=[block.mlp.act_fn for block in blocks],
        final_norm_input=[llama.model.norm],
    )
    blocks = list(bert.encoder.layer)  # a norm behind one block feeds the next
    measured = check_sites(
        bert,
        attention_norm_input=[bert.embeddings.LayerNorm, blocks[0].output.LayerNorm],
        feed_forward_norm_input=[block.attention.output.LayerNorm for block in blocks],
    )
    assert "final_norm_input_min" not in measured.values  # BERT's last norm is inside of its last block


def test_a_model_without_norms_has_no_ranges_of_norms() -> None:
    measured = measure(small_model(norm="none", final_norm="none"), IDS, "ranges")
    assert {name.rpartition("_")[0] for name in measured.values} == {"softmax_input", "activation_input"}


@given(st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=1), st.floats(0.0, 1.0))
def test_a_quantile_is_within_half_a_bin(values: list[float], share: float) -> None:
    expected = np.quantile(values, share, method="inverted_cdf")
    [measured] = quantiles(float_counts(torch.tensor(values)), [share])
    assert measured.item() == pytest.approx(expected, rel=WITHIN, abs=1e-38)


def test_a_quantile_of_nothing_or_nan_is_nan() -> None:
    for values in ([], [1.0, torch.nan]):
        assert quantiles(float_counts(torch.tensor(values)), [0.1, 0.9]).isnan().all()


def test_a_hidden_key_that_is_infinite_changes_nothing() -> None:
    q, k = torch.randn(2, 1, 2, 6, 4)
    call = AttentionCall(q, k, None, None, None, True, None, None, False, False, 6, None)
    broken = call._replace(k=torch.cat([k, torch.full((1, 2, 1, 4), torch.inf)], dim=2))
    hidden = torch.arange(7) <= torch.arange(6)[:, None]
    broken = broken._replace(mask=hidden[None, None], causal=False, own_keys=7)
    for value, expected in zip(scores.scores_of(broken), scores.scores_of(call), strict=True):
        assert torch.equal(value, expected)
