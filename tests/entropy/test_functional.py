"""attention_entropy against closed forms and float64, over masks, shapes, dtypes and paths; on a GPU by tests/gpu."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normfree.entropy import AttentionEntropy, attention_entropy, functional
from normfree.entropy.layers import HeadLayer
from normfree.entropy.statistics import HeadSums
from tests.entropy.truths import causal, check, truth
from tests.entropy.truths import random_heads as heads

Q = heads()[0]
METHODS = ("auto", "blocked", "reference")
PADDING = torch.ones(2, 33, dtype=torch.bool)
PADDING[0, :5] = PADDING[1, -7:] = False


@pytest.fixture(scope="module")
def entropy_of(device: str):
    """`attention_entropy` on the device, of tensors on the CPU and with its result there."""

    def moved(value):
        return value.to(device) if isinstance(value, Tensor) else value

    def measure(q: Tensor, k: Tensor, **options) -> AttentionEntropy:
        result = attention_entropy(moved(q), moved(k), **{name: moved(value) for name, value in options.items()})
        assert result.nats.device.type == device
        return AttentionEntropy(**{name: value.cpu() for name, value in vars(result).items() if value is not None})

    return measure


@pytest.mark.parametrize("method", METHODS)
def test_uniform_attention_has_ln_of_the_visible_keys(method, entropy_of):
    q = torch.zeros(1, 2, 128, 8)
    _, k = heads(batch=1, query_heads=2, queries=128, width=8)
    result = entropy_of(q, k, causal=True, method=method)
    assert result.nats.mean().item() == pytest.approx(math.lgamma(129) / 128, abs=1e-5)  # ln(128!) / 128 = 3.878
    torch.testing.assert_close(result.nats[0, 0], torch.arange(1, 129).log(), atol=1e-5, rtol=0)
    assert result.visible[0, 0].tolist() == list(range(1, 129))


@pytest.mark.parametrize("method", METHODS)
def test_one_hot_attention_has_no_entropy(method, entropy_of):
    k = torch.eye(16)[None, None]
    result = entropy_of(1000 * k, k, causal=False, scale=1.0, method=method)
    assert 0 <= result.nats.min() <= result.nats.max() < 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("size", "is_exact"), [(1.0, False), (100.0, True)])
@pytest.mark.parametrize("queries", [1, 7, 300])
def test_ordinary_and_collapsed_heads_are_exact_in_every_dtype(dtype, size, is_exact, queries, entropy_of):
    q, k = (x.to(dtype) for x in heads(queries=queries, keys=300, size=size, batch=1, width=64))
    result = entropy_of(q, k, causal=True)
    assert result.nats.dtype == torch.promote_types(dtype, torch.float32)
    assert (result.exact == is_exact).all() or dtype == torch.float64  # rounding is no concern there
    check(result.nats, truth(q, k, causal(queries, 300))["nats"], 1e-11 if dtype == torch.float64 else 1e-5)
    assert (result.nats >= 0).all()


@pytest.mark.parametrize("width", [1, 2, 4, 8, 12, 15, 16, 20, 33, 64, 128, 256])
@pytest.mark.parametrize("seed", range(3))
def test_heads_at_the_limit_are_within_3e_5_nats(width, seed, entropy_of):
    q, k = (x.abs() for x in heads(batch=1, query_heads=4, key_heads=4, queries=256, width=width, seed=seed))
    bound = q.norm(dim=-1).amax(-1) * (k - k.mean(-2, keepdim=True)).norm(dim=-1).amax(-1) * width**-0.5
    q = q * (0.999 * functional.SCORE_LIMIT / bound)[..., None, None]
    result = entropy_of(q, k, causal=True)
    check(result.nats, truth(q, k, causal(256, 256))["nats"], 3e-5)
    assert (result.exact == (width < 16)).all()


def test_only_the_collapsed_head_leaves_the_fused_path(entropy_of):
    q, k = heads()
    q[1, 2] *= 100
    result = entropy_of(q, k, causal=True, patterns=True)
    assert result.exact.nonzero().tolist() == [[1, 2]]
    check(result.nats, truth(q, k, causal(33, 33))["nats"])


def test_a_common_shift_of_all_keys_changes_nothing(entropy_of):
    q, k = heads(queries=64)
    plain = entropy_of(q, k, causal=True)
    shifted = entropy_of(q, k + 30.0, causal=True)
    assert not shifted.exact.any()
    torch.testing.assert_close(shifted.nats, plain.nats, atol=2e-5, rtol=0)


def test_float32_measurement_is_not_lowered_by_autocast(device, entropy_of):
    q, k = heads()
    plain = entropy_of(q, k, causal=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        for method in METHODS:
            lowered = entropy_of(q, k, causal=True, method=method)
            torch.testing.assert_close(lowered.nats, plain.nats, atol=1e-5, rtol=0)


@settings(max_examples=40)
@given(data=st.data())
def test_all_paths_match_the_truth_on_any_shape_and_mask(data, entropy_of):
    key_heads, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    queries, keys = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    seed, is_causal = data.draw(st.integers(0, 1000)), data.draw(st.booleans())
    window = data.draw(st.none() | st.integers(1, 6)) if is_causal else None
    shape = [data.draw(st.sampled_from([1, n])) for n in (2, key_heads * groups, queries, keys)]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < data.draw(st.sampled_from([0.2, 0.8]))
    sizes = {"queries": queries, "keys": keys, "width": data.draw(st.sampled_from([4, 16, 33])), "seed": seed}
    q, k = heads(query_heads=key_heads * groups, key_heads=key_heads, **sizes)
    visible = mask.expand(2, key_heads * groups, queries, keys)
    if is_causal:
        visible = visible & causal(queries, keys)
    if window is not None:
        visible = visible.triu(keys - queries - window + 1)
    expected = truth(q, k, visible)["nats"]
    for method in METHODS:
        result = entropy_of(q, k, causal=is_causal, mask=mask, window=window, method=method)
        assert torch.equal(result.visible, visible.sum(-1, dtype=torch.int32))
        assert torch.equal(result.counted, visible.any(-1))
        check(result.nats, expected)


@pytest.mark.parametrize("method", METHODS)
def test_window_sees_itself_and_the_keys_just_before(method, entropy_of):
    """A row that no longer reaches the first token has no mass there, alone or among all rows."""
    q, k = heads(queries=600, batch=1)
    result = entropy_of(q, k, causal=True, window=5, method=method, patterns=True)
    check(result.nats, truth(q, k, causal(600, 600).triu(-4))["nats"])
    assert result.visible.amax() == 5
    assert torch.equal(result.first_mass > 0, (torch.arange(600) < 5).expand_as(result.first_mass))
    last = entropy_of(q[:, :, -1:], k, causal=True, window=5, patterns=True, method=method)
    assert (last.first_mass == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_all_heads_of_a_text_have_one_first_token(method, entropy_of):
    q, k = heads(queries=9, batch=1)
    mask = torch.ones(1, q.shape[1], 1, 9, dtype=torch.bool)
    mask[:, 1, :, 0] = False
    first_mass = entropy_of(q, k, causal=True, mask=mask, method=method, patterns=True).first_mass
    assert (first_mass[:, 1, 1:] == 0).all()  # this head never sees it
    assert (first_mass[:, 0] > 0).all()


@pytest.mark.parametrize("method", ["auto", "reference"])
def test_softcap_bias_sinks_and_scales_match_their_formulas(method, entropy_of):
    q, k = heads()
    generator = torch.Generator().manual_seed(5)
    bias, sinks = torch.randn(1, 4, 33, 33, generator=generator), torch.randn(4, generator=generator)
    for options, true_options in (
        ({"softcap": 0.7}, {"softcap": 0.7}),
        ({"mask": bias}, {"bias": bias}),
        ({"sinks": sinks}, {"sinks": sinks}),
        ({"scale": -0.5}, {"scale": -0.5}),
        ({"scale": 0.0}, {"scale": 0.0}),
    ):
        result = entropy_of(q, k, causal=True, method=method, **options)
        check(result.nats, truth(q, k, causal(33, 33), **true_options)["nats"])
        assert result.exact.all()


def test_additive_masks_without_bias_stay_on_the_fused_path(entropy_of):
    q, k = heads()
    visible = torch.ones(33, 33, dtype=torch.bool).tril()[None, None]
    for dtype in (torch.float32, torch.float16):
        additive = torch.zeros(1, 1, 33, 33, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        result = entropy_of(q, k, causal=False, mask=additive)
        assert not result.exact.any()
        torch.testing.assert_close(result.nats, entropy_of(q, k, causal=True).nats, atol=1e-5, rtol=0)


def test_broken_numbers_spoil_only_the_rows_that_see_them(entropy_of):
    q, k = heads(query_heads=2, key_heads=2)
    k[0, 1, 20, 3] = torch.nan
    q[1, 0, 4, 0] = torch.inf
    result = entropy_of(q, k, causal=True, patterns=True)
    clean = torch.ones(2, 2, 33, dtype=torch.bool)
    clean[0, 1, 20:] = False
    clean[1, 0, 4] = False
    assert torch.equal(result.counted, clean)
    assert result.nats[~clean].isnan().all()


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": False, "mask": torch.arange(33).expand(2, -1) < 20}])
def test_invisible_nan_keys_spoil_no_value_and_no_gradient(options, entropy_of):
    q, k = heads(query_heads=2, key_heads=2)
    broken = k.clone()
    broken[:, :, 20:] = torch.nan
    gradients = []
    for keys in (k, broken):
        inputs = q.clone().requires_grad_(), keys.requires_grad_()
        result = entropy_of(*inputs, differentiable=True, **options)
        rows = result.counted if not options["causal"] else torch.arange(33).expand_as(result.counted) < 20
        assert result.counted[rows].all()
        plain = entropy_of(q, keys.detach(), **options)
        assert torch.equal(result.nats[rows], plain.nats[rows])
        gradients.append(torch.autograd.grad(result.nats[rows].sum(), inputs))
    (clean_q, clean_k), (broken_q, broken_k) = gradients
    torch.testing.assert_close(broken_q, clean_q, atol=1e-5, rtol=0)
    torch.testing.assert_close(broken_k[:, :, :20], clean_k[:, :, :20], atol=1e-5, rtol=0)
    assert broken_k.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_distance_and_sink_match_the_matrix(method, size, entropy_of):
    q, k = heads(queries=40, size=size)
    real = torch.ones(2, 40, dtype=torch.long)
    real[0, :6] = 0
    expected = truth(q, k, causal(40, 40) & real.bool()[:, None, None])
    result = entropy_of(q, k, causal=True, mask=real, patterns=True, method=method)
    check(result.distance, expected["distance"], 1e-4)
    check(result.first_mass, expected["first_mass"])


@pytest.mark.parametrize(
    ("options", "visible"),
    [
        ({"causal": True}, causal(33, 33)),
        ({"causal": False}, torch.ones(33, 33, dtype=torch.bool)),
        ({"causal": True, "window": 9}, causal(33, 33).triu(-8)),
        ({"causal": True, "mask": PADDING}, causal(33, 33) & PADDING[:, None, None]),
        ({"causal": False, "mask": causal(33, 33).roll(3, 1)[None, None]}, causal(33, 33).roll(3, 1)),
    ],
    ids=["causal", "full", "window", "padding", "rows"],
)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("width", [33, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_gradients_are_those_of_the_definition(options, visible, key_heads, width, dtype, tolerance, entropy_of):
    q, k = heads(key_heads=key_heads, width=width)
    weights = torch.randn(2, 4, 33, generator=torch.Generator().manual_seed(3))
    exact, ours = ([value.to(kind, copy=True).requires_grad_() for value in (q, k)] for kind in (torch.float64, dtype))
    (truth(*exact, visible)["nats"].nan_to_num() * weights).sum().backward()
    result = entropy_of(*ours, differentiable=True, **options)
    torch.where(result.counted, result.nats * weights, 0.0).sum().backward()
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine.grad.double() - theirs.grad).abs().max() < tolerance * theirs.grad.abs().max()


LAYOUTS = {
    "tokens first": lambda value: value.transpose(1, 2).contiguous().transpose(1, 2),
    "width first": lambda value: value.mT.contiguous().mT,
    "part of a projection": lambda value: torch.cat([value, value], dim=-1).split(value.shape[-1], dim=-1)[1],
    "odd row stride": lambda value: torch.nn.functional.pad(value, (1, 2))[..., 1:-2],
}


@pytest.mark.parametrize("which", ["q", "k", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory_gives_the_same_entropy(which, layout, device):
    """torch's private kernel reads the numbers of a row as neighbours, wherever they lie."""
    q, k = heads(queries=70)
    laid = {name: LAYOUTS[layout](x.to(device)) for name, x in (("q", q), ("k", k)) if which in (name, "both")}
    result = attention_entropy(**{"q": q.to(device), "k": k.to(device)} | laid, causal=True)
    assert not result.exact.any()
    check(result.nats, truth(q, k, causal(70, 70))["nats"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mask": torch.ones(3, 5)}, "mask has shape"),
        ({"mask": torch.ones(2, 4, 33, 33, dtype=torch.long)}, "give bool"),
        ({"window": 0}, "at least 1"),
        ({"causal": False, "window": 4}, "needs causal=True"),
        ({"softcap": -1.0}, "above 0"),
        ({"sinks": torch.zeros(3)}, r"sinks have shape \(3,\)"),
        ({"mask": torch.full((2, 33), -1.0)}, "other values than 1"),
        ({"method": "flash"}, "allowed"),
        ({"softcap": 3.0, "differentiable": True}, "method='reference'"),
        *(({"q": wrong}, r"^q \(") for wrong in (Q[0], Q[:, :3], Q[..., :8], Q[:1], Q[:, :, :0])),
        ({"q": Q.half()}, "q is torch.float16 and k is"),
    ],
)
def test_wrong_requests_are_refused(change, complaint, entropy_of):
    q, k = heads()
    with pytest.raises(ValueError, match=complaint):
        entropy_of(**{"q": q, "k": k, "causal": True} | change)


@pytest.mark.parametrize(("broken_from", "rows"), [(8, 8), (0, 0)])
def test_the_ceiling_is_that_of_the_rows_in_the_mean(broken_from, rows, entropy_of):
    """Uniform rows until a key is NaN; a call of which no row is left takes no part."""
    q, k = torch.zeros(1, 2, 20, 8), torch.zeros(1, 2, 20, 8)
    k[:, :, broken_from] = math.nan
    sums = HeadSums()
    sums.add(HeadLayer.of("", 0), entropy_of(q, k, causal=True))
    statistics = sums.statistics()
    expected = torch.arange(1, rows + 1, dtype=torch.float64).log().mean()
    torch.testing.assert_close(statistics.ceiling_nats(), expected[None], equal_nan=True)
    sums.add(HeadLayer.of("", 0), entropy_of(q[:, :, :8], q[:, :, :8], causal=True))
    both = sums.statistics().ceiling_nats()
    torch.testing.assert_close(both, torch.arange(1, 9, dtype=torch.float64).log().mean()[None])
    assert statistics.nonfinite_rows.tolist() == [[20 - broken_from] * 2]
    if broken_from:
        torch.testing.assert_close(statistics.mean_nats(), expected.expand(1, 2), atol=1e-6, rtol=0)
