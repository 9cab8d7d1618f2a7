"""attention_entropy against closed forms and float64, over masks, shapes, dtypes and paths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truths import causal_by_numpy, entropy_by_numpy, scores_by_numpy

from normfree.entropy import attention_entropy
from normfree.entropy.recorder import Recorder


def heads(*, batch=2, query_heads=4, key_heads=2, queries=33, keys=None, width=16, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, query_heads, queries, width, generator=generator) * size
    k = torch.randn(batch, key_heads, keys or queries, width, generator=generator)
    return q, k


def truth(q, k, visible, *, scale=None):
    return entropy_by_numpy(scores_by_numpy(q, k, scale or q.shape[-1] ** -0.5), visible)


def largest_error(nats: torch.Tensor, expected: np.ndarray) -> float:
    np.testing.assert_array_equal(nats.isnan().numpy(), np.isnan(expected))
    return float(np.nanmax(abs(nats.double().numpy() - expected)))


@pytest.mark.parametrize("method", ["auto", "blocked", "reference"])
def test_uniform_attention_has_ln_of_the_visible_keys(method):
    q = torch.zeros(1, 2, 128, 8)
    _, k = heads(batch=1, query_heads=2, queries=128, width=8)
    result = attention_entropy(q, k, causal=True, method=method)
    assert result.nats.mean().item() == pytest.approx(math.lgamma(129) / 128, abs=1e-5)  # ln(128!) / 128 = 3.878
    torch.testing.assert_close(result.nats[0, 0], torch.arange(1, 129).log(), atol=1e-5, rtol=0)
    assert result.visible[0, 0].tolist() == list(range(1, 129))


@pytest.mark.parametrize("method", ["auto", "blocked", "reference"])
def test_one_hot_attention_has_no_entropy(method):
    k = torch.eye(16)[None, None]
    result = attention_entropy(1000 * k, k, causal=False, scale=1.0, method=method)
    assert 0 <= result.nats.min() <= result.nats.max() < 1e-30


@pytest.mark.parametrize(("size", "served"), [(1.0, "fused"), (100.0, "exact")])
@pytest.mark.parametrize("queries", [1, 7, 300])
def test_ordinary_and_collapsed_heads_are_within_1e_5_of_float64(size, served, queries):
    q, k = heads(queries=queries, keys=300, size=size, batch=1, width=64)
    result = attention_entropy(q, k, causal=True)
    assert result.path == served
    assert largest_error(result.nats, truth(q, k, causal_by_numpy(queries, 300))) < 1e-5
    assert (result.nats >= 0).all()


def test_scores_at_the_limit_of_the_fused_path_are_within_1e_5_nats():
    from normfree.entropy import functional, fused
    from normfree.entropy.request import Request
    from normfree.entropy.visibility import Visibility

    q, k = heads(batch=1, query_heads=8, key_heads=8, queries=512, width=64)
    request = Request(q, k, 0.125, Visibility(512, 512, True, None, None, q.device))
    q = q * (0.999 * functional.SCORE_LIMIT / fused.score_bound(request))[..., None, None]
    result = attention_entropy(q, k, causal=True)
    assert result.path == "fused"
    assert largest_error(result.nats, truth(q, k, causal_by_numpy(512, 512))) < 1e-5


@pytest.mark.parametrize("width", [1, 2, 4, 8, 12, 15, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("seed", range(3))
def test_heads_of_any_width_at_a_bound_of_30_are_within_1e_5_nats(width, seed):
    q, k = (x.abs() for x in heads(batch=1, query_heads=4, key_heads=4, queries=256, width=width, seed=seed))
    bound = q.norm(dim=-1).amax(-1) * (k - k.mean(-2, keepdim=True)).norm(dim=-1).amax(-1) * width**-0.5
    q = q * (30 / bound)[..., None, None]
    result = attention_entropy(q, k, causal=True)
    assert largest_error(result.nats, truth(q, k, causal_by_numpy(256, 256))) < 1e-5
    assert result.path == ("exact" if width < 16 else "fused")


def test_only_the_collapsed_head_leaves_the_fused_path():
    q, k = heads()
    q[1, 2] *= 100
    result = attention_entropy(q, k, causal=True, patterns=True)
    assert result.path == "fused+exact"
    assert result.exact.nonzero().tolist() == [[1, 2]]
    assert largest_error(result.nats, truth(q, k, causal_by_numpy(33, 33))) < 1e-5


def test_a_common_shift_of_all_keys_changes_nothing():
    q, k = heads(queries=64)
    plain = attention_entropy(q, k, causal=True)
    shifted = attention_entropy(q, k + 30.0, causal=True)
    assert shifted.path == "fused"
    torch.testing.assert_close(shifted.nats, plain.nats, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_half_precision_inputs_are_raised_before_any_sum(dtype, size):
    q, k = (x.to(dtype) for x in heads(size=size))
    result = attention_entropy(q, k, causal=True)
    assert result.nats.dtype == torch.float32
    assert largest_error(result.nats, truth(q, k, causal_by_numpy(33, 33))) < 1e-5


def test_float64_inputs_stay_float64():
    q, k = (x.double() for x in heads())
    result = attention_entropy(q, k, causal=True)
    assert result.path == "fused"
    assert largest_error(result.nats, truth(q, k, causal_by_numpy(33, 33))) < 1e-12


def test_float32_measurement_is_not_lowered_by_autocast():
    q, k = heads()
    plain = attention_entropy(q, k, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for method in ("auto", "blocked", "reference"):
            lowered = attention_entropy(q, k, causal=True, method=method)
            torch.testing.assert_close(lowered.nats, plain.nats, atol=1e-5, rtol=0)


@settings(max_examples=40)
@given(data=st.data())
def test_fused_and_exact_paths_match_numpy_on_any_shape_and_mask(data):
    key_heads, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    queries, keys = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    seed, causal = data.draw(st.integers(0, 1000)), data.draw(st.booleans())
    shape = [data.draw(st.sampled_from([1, n])) for n in (2, key_heads * groups, queries, keys)]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < data.draw(st.sampled_from([0.2, 0.8]))
    q, k = heads(query_heads=key_heads * groups, key_heads=key_heads, queries=queries, keys=keys, width=4, seed=seed)
    visible = np.broadcast_to(mask.numpy(), (2, key_heads * groups, queries, keys))
    if causal:
        visible = visible & causal_by_numpy(queries, keys)
    expected = truth(q, k, visible)
    asked: dict[str, Any] = {"causal": causal, "mask": mask}
    for method in ("auto", "blocked", "reference"):
        result = attention_entropy(q, k, method=method, **asked)
        np.testing.assert_array_equal(result.visible.numpy(), visible.sum(-1))
        np.testing.assert_array_equal(result.counted.numpy(), visible.any(-1))
        np.testing.assert_allclose(result.nats.numpy(), expected, atol=1e-5)


def test_padding_on_either_side_does_not_change_the_real_rows():
    q, k = heads(batch=1, queries=20)
    alone = attention_entropy(q, k, causal=True).nats
    for left, right in ((5, 0), (0, 5), (300, 4)):
        padded_q, padded_k = (torch.nn.functional.pad(x, (0, 0, left, right), value=9.0) for x in (q, k))
        real = torch.zeros(1, 20 + left + right, dtype=torch.long)
        real[:, left : left + 20] = 1
        result = attention_entropy(padded_q, padded_k, causal=True, mask=real)
        torch.testing.assert_close(result.nats[:, :, left : left + 20], alone, atol=1e-5, rtol=0)
        assert not result.counted[:, :, :left].any()
        assert result.nats[:, :, :left].isnan().all()


def test_key_cache_gives_the_last_rows_of_the_whole():
    q, k = heads(queries=30)
    whole = attention_entropy(q, k, causal=True)
    last = attention_entropy(q[:, :, 18:], k, causal=True)
    torch.testing.assert_close(last.nats, whole.nats[:, :, 18:], atol=1e-5, rtol=0)
    assert torch.equal(last.visible, whole.visible[:, :, 18:])


@pytest.mark.parametrize("method", ["auto", "blocked", "reference"])
def test_window_sees_itself_and_the_keys_just_before(method):
    q, k = heads(queries=600, batch=1)
    near = np.arange(600)[:, None] - np.arange(600)[None]
    visible = ((near >= 0) & (near < 5))[None, None]
    result = attention_entropy(q, k, causal=True, window=5, method=method)
    assert largest_error(result.nats, truth(q, k, visible)) < 1e-5
    assert result.visible.amax() == 5


def test_softcap_bias_and_sinks_match_their_formulas():
    q, k = heads()
    scores, causal = scores_by_numpy(q, k, 0.25), causal_by_numpy(33, 33)
    generator = torch.Generator().manual_seed(5)
    bias, sinks = torch.randn(1, 4, 33, 33, generator=generator), torch.randn(4, generator=generator)

    capped = attention_entropy(q, k, causal=True, softcap=0.7)
    assert largest_error(capped.nats, entropy_by_numpy(0.7 * np.tanh(scores / 0.7), causal)) < 1e-5
    biased = attention_entropy(q, k, causal=True, mask=bias)
    assert largest_error(biased.nats, entropy_by_numpy(scores + bias.double().numpy(), causal)) < 1e-5
    assert (capped.path, biased.path) == ("exact", "exact")

    e = np.exp(scores) * causal
    p = e / (e.sum(-1, keepdims=True) + np.exp(sinks.double().numpy())[None, :, None, None])
    expected = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    for method in ("auto", "reference"):
        assert largest_error(attention_entropy(q, k, causal=True, sinks=sinks, method=method).nats, expected) < 1e-5


def test_additive_masks_of_zero_and_minimum_stay_on_the_fused_path():
    q, k = heads()
    visible = torch.ones(33, 33, dtype=torch.bool).tril()[None, None]
    for dtype in (torch.float32, torch.float16):
        additive = torch.zeros(1, 1, 33, 33, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        result = attention_entropy(q, k, causal=False, mask=additive)
        assert result.path == "fused"
        torch.testing.assert_close(result.nats, attention_entropy(q, k, causal=True).nats, atol=1e-5, rtol=0)


def test_broken_numbers_spoil_only_the_rows_that_see_them():
    q, k = heads(query_heads=2, key_heads=2)
    k[0, 1, 20, 3] = torch.nan
    q[1, 0, 4, 0] = torch.inf
    result = attention_entropy(q, k, causal=True, patterns=True)
    clean = torch.ones(2, 2, 33, dtype=torch.bool)
    clean[0, 1, 20:] = False
    clean[1, 0, 4] = False
    assert torch.equal(result.counted, clean)
    assert result.nats[~clean].isnan().all()


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_that_is_not_positive_is_as_good_as_any(scale):
    q, k = heads()
    found = attention_entropy(q, k, causal=True, scale=scale)
    expected = attention_entropy(q, k, causal=True, scale=scale, method="reference")
    torch.testing.assert_close(found.nats, expected.nats, atol=1e-5, rtol=0)


@pytest.mark.parametrize("asked", [{"causal": True}, {"causal": False, "mask": torch.arange(33).expand(2, -1) < 20}])
def test_broken_numbers_that_no_row_sees_spoil_no_value_and_no_gradient(asked):
    q, k = heads(query_heads=2, key_heads=2)
    broken = k.clone()
    broken[:, :, 20:] = torch.nan
    gradients = []
    for keys in (k, broken):
        asked_q, asked_k = q.clone().requires_grad_(), keys.requires_grad_()
        result = attention_entropy(asked_q, asked_k, differentiable=True, **asked)
        rows = result.counted if not asked["causal"] else torch.arange(33).expand_as(result.counted) < 20
        assert result.counted[rows].all()
        plain = attention_entropy(q, keys.detach(), **asked)
        assert torch.equal(result.nats[rows], plain.nats[rows])
        gradients.append(torch.autograd.grad(result.nats[rows].sum(), (asked_q, asked_k)))
    (clean_q, clean_k), (broken_q, broken_k) = gradients
    torch.testing.assert_close(broken_q, clean_q, atol=1e-5, rtol=0)
    torch.testing.assert_close(broken_k[:, :, :20], clean_k[:, :, :20], atol=1e-5, rtol=0)
    assert broken_k.isfinite().all()


def test_distance_and_sink_match_the_matrix():
    for size in (1.0, 60.0):
        q, k = heads(queries=40, size=size)
        real = torch.ones(2, 40, dtype=torch.long)
        real[0, :6] = 0
        visible = causal_by_numpy(40, 40) & real.bool().numpy()[:, None, None]
        scores = np.where(visible, scores_by_numpy(q, k, 0.25), -np.inf)
        for row in (6, 20, 39):
            p = np.exp(scores[:, :, row] - scores[:, :, row].max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            result = attention_entropy(q, k, causal=True, mask=real, patterns=True)
            deep = attention_entropy(q, k, causal=True, mask=real, patterns=True, method="blocked")
            for found in (result, deep):
                assert found.distance is not None
                assert found.first_mass is not None
                np.testing.assert_allclose(found.distance[:, :, row], row - p @ np.arange(40), atol=1e-4)
                np.testing.assert_allclose(found.first_mass[0, :, row], p[0, :, 6], atol=1e-5)
                np.testing.assert_allclose(found.first_mass[1, :, row], p[1, :, 0], atol=1e-5)
            assert deep.path == "exact"


@pytest.mark.parametrize(
    "asked",
    [
        {"causal": True},
        {"causal": False},
        {"causal": True, "window": 3},
        {"causal": True, "mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]])},
    ],
)
def test_gradient_is_exact_in_float64(asked):
    q, k = (x.double().requires_grad_() for x in heads(queries=6, width=3, query_heads=2, key_heads=1))

    def measured(q, k):
        result = attention_entropy(q, k, differentiable=True, **asked)
        return result.nats[result.counted]

    assert torch.autograd.gradcheck(measured, (q, k))
    got = torch.autograd.grad(measured(q, k).sum(), (q, k))
    slow = attention_entropy(q, k, method="reference", **asked)
    expected = torch.autograd.grad(slow.nats[slow.counted].sum(), (q, k))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_gradient_of_a_collapsed_head_follows_the_exact_values():
    q, k = heads(size=100.0)
    q.requires_grad_()
    result = attention_entropy(q, k, causal=True, differentiable=True)
    assert torch.equal(result.nats, attention_entropy(q, k, causal=True).nats)
    (gradient,) = torch.autograd.grad(result.nats.sum(), q)
    assert gradient.isfinite().all()


def test_compiles_without_a_graph_break():
    def loss(q, k):
        result = attention_entropy(q, k, causal=True, differentiable=True)
        return result.nats.mean()

    q, k = (x.requires_grad_() for x in heads())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), loss(q, k))
    a, b = torch.autograd.grad(compiled(q, k), q)[0], torch.autograd.grad(loss(q, k), q)[0]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mask": torch.ones(3, 5)}, "mask has shape"),
        ({"mask": torch.ones(2, 4, 33, 33, dtype=torch.long)}, "give bool"),
        ({"window": 0}, "at least 1"),
        ({"causal": False, "window": 4}, "needs causal=True"),
        ({"softcap": -1.0}, "above 0"),
        ({"sinks": torch.zeros(3)}, "one logit a head"),
        ({"method": "flash"}, "allowed"),
        ({"softcap": 3.0, "differentiable": True}, "method='reference'"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(change, complaint):
    q, k = heads()
    with pytest.raises(ValueError, match=complaint) as caught:
        attention_entropy(q, k, **{"causal": True} | change)
    assert "\n" not in str(caught.value)


def test_wrong_shapes_and_dtypes_are_refused():
    q, k = heads()
    for bad_q, bad_k in (
        (q[0], k),
        (q[:, :3], k),
        (q[..., :8], k),
        (q[:1], k),
        (q[:, :, :0], k),
        (q.half(), k),
    ):
        with pytest.raises(ValueError, match=r"q (and k |\(|is )"):
            attention_entropy(bad_q, bad_k, causal=True)


def test_the_first_token_stays_the_first_behind_a_window():
    """A row that no longer reaches it has no mass there, alone or among all rows."""
    q, k = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    asked = {"causal": True, "window": 5, "patterns": True}
    for method in ("auto", "blocked", "reference"):
        whole = attention_entropy(q, k, method=method, **asked).first_mass
        last = attention_entropy(q[:, :, -1:], k, method=method, **asked).first_mass
        assert (whole[..., 5:] == 0).all()
        assert (whole[..., :5] > 0).all()
        assert (last == 0).all()


def test_a_padding_mask_has_two_values():
    q = torch.randn(2, 1, 6, 4)
    ones = torch.ones(2, 6)
    ones[0, :2] = 0
    assert attention_entropy(q, q, causal=True, mask=ones).visible[0, 0].tolist() == [0, 0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="1 \\(or True\\) for real tokens and 0 for padding"):
        attention_entropy(q, q, causal=True, mask=torch.where(ones == 0, -torch.inf, 0.0))


@pytest.mark.parametrize(("broken_from", "rows"), [(8, 8), (0, 0)])
def test_the_ceiling_is_that_of_the_rows_in_the_mean(broken_from, rows):
    """Uniform rows until a key is NaN; a call of which no row is left takes no part."""
    q, k = torch.zeros(1, 2, 20, 8), torch.zeros(1, 2, 20, 8)
    k[:, :, broken_from] = math.nan
    recorder = Recorder()
    recorder.add(0, attention_entropy(q, k, causal=True))
    found = recorder.statistics()
    expected = torch.arange(1, rows + 1, dtype=torch.float64).log().mean()
    torch.testing.assert_close(found.ceiling_nats(), expected[None], equal_nan=True)
    recorder.add(0, attention_entropy(q[:, :, :8], q[:, :, :8], causal=True))
    both = recorder.statistics().ceiling_nats()
    torch.testing.assert_close(both, torch.arange(1, 9, dtype=torch.float64).log().mean()[None])
    assert found.nonfinite_rows.tolist() == [[20 - broken_from] * 2]
    if broken_from:
        torch.testing.assert_close(found.mean_nats(), expected.expand(1, 2), atol=1e-6, rtol=0)
