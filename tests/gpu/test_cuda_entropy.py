"""attention_entropy on CUDA against softmax and entropy written out in float64 on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from normfree.entropy import attention_entropy, functional, fused
from normfree.entropy.request import Request
from normfree.entropy.visibility import Visibility
from tests.entropy.truths import causal, check, random_heads, truth

DEVICE = "cuda"
TOLERANCE = 1e-5
MIB = 2**20


heads = partial(random_heads, query_heads=6, queries=70, width=64)


def on_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def measured(q: Tensor, k: Tensor, **options: Any):
    options = {name: on_device(value) for name, value in options.items()}
    result = attention_entropy(on_device(q), on_device(k), **options)
    assert result.nats.device.type == DEVICE
    return result


@pytest.mark.parametrize("width", [3, 20, 33, 64, 128, 200])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (37, 101), (1, 65)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_float32_is_within_1e_5_nats_of_float64(width, queries, keys, is_causal):
    q, k = heads(width=width, queries=queries, keys=keys)
    result = measured(q, k, causal=is_causal)
    assert result.path == "fused"
    visible = causal(queries, keys) if is_causal else torch.ones(queries, keys, dtype=torch.bool)
    check(result.nats, truth(q, k, visible)["nats"])
    assert torch.equal(result.visible.cpu(), visible.sum(-1).expand(2, 6, -1).int())


@pytest.mark.parametrize("grouping", [(4, 4), (6, 3), (8, 1)])
def test_grouped_queries_over_several_blocks_of_rows(grouping):
    q, k = heads(query_heads=grouping[0], key_heads=grouping[1], queries=600, width=32)
    mask = torch.ones(2, 600, dtype=torch.bool)
    mask[0, :300] = False
    result = measured(q, k, causal=True, mask=mask)
    assert result.path == "fused"
    check(result.nats, truth(q, k, causal(600, 600) & mask[:, None, None])["nats"])


def masked_cases(S: int = 53) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """name -> (path, arguments of attention_entropy, arguments of truth), for 45 queries."""
    T = 45
    random = torch.Generator().manual_seed(1)
    padding = torch.ones(2, S, dtype=torch.bool)
    padding[0, :20] = False
    padding[1, -7:] = False
    rows = torch.rand(2, 6, T, S, generator=random) < 0.3
    rows[1, 4, 7] = False
    bias = torch.randn(1, 6, T, S, generator=random)
    after = causal(T, S)
    near = after & (torch.arange(S)[None] > torch.arange(T)[:, None] + S - T - 9)
    hiding = torch.zeros(2, 1, T, S).masked_fill(~(after & padding[:, None, None]), -torch.inf)
    lowest = torch.zeros(2, 1, T, S).masked_fill(~padding[:, None, None], torch.finfo(torch.float32).min)
    sinks = torch.linspace(-2, 2, 6)
    full = torch.ones(T, S, dtype=torch.bool)
    return {
        "causal": ("fused", {"causal": True}, {"visible": after}),
        "full": ("fused", {"causal": False}, {"visible": full}),
        "padding": ("fused", {"causal": True, "mask": padding}, {"visible": after & padding[:, None, None]}),
        "rows": ("fused", {"causal": False, "mask": rows}, {"visible": rows}),
        "causal rows": ("fused", {"causal": True, "mask": rows}, {"visible": rows & after}),
        "one mask for all": ("fused", {"causal": False, "mask": rows[:1, :1]}, {"visible": rows[:1, :1]}),
        "window": ("fused", {"causal": True, "window": 9}, {"visible": near}),
        "hiding mask": ("fused", {"causal": False, "mask": hiding}, {"visible": after & padding[:, None, None]}),
        "lowest number": ("fused", {"causal": True, "mask": lowest}, {"visible": after & padding[:, None, None]}),
        "scale": ("fused", {"causal": True, "scale": 0.3}, {"visible": after, "scale": 0.3}),
        "bias": ("exact", {"causal": True, "mask": bias}, {"visible": after, "bias": bias}),
        "softcap": ("exact", {"causal": True, "softcap": 2.0}, {"visible": after, "softcap": 2.0}),
        "sinks": ("exact", {"causal": True, "sinks": sinks}, {"visible": after, "sinks": sinks}),
        "sinks, bias": (
            "exact",
            {"causal": False, "sinks": sinks, "mask": bias},
            {"visible": full, "sinks": sinks, "bias": bias},
        ),
    }


@pytest.mark.parametrize("case", list(masked_cases()))
@pytest.mark.parametrize("width", [33, 64])
def test_masks_windows_caps_and_sinks_with_patterns(case, width):
    path, options, true_options = masked_cases()[case]
    q, k = heads(queries=45, keys=53, width=width)
    expected = truth(q, k, **true_options)
    result = measured(q, k, patterns=True, **options)
    assert result.path == path
    check(result.nats, expected["nats"])
    check(result.distance, expected["distance"], 2e-4)
    if case not in ("rows", "causal rows", "one mask for all", "window"):  # there the first key differs from row to row
        check(result.first_mass, expected["first_mass"])
    check(measured(q, k, **options).nats, expected["nats"])
    exact = measured(q, k, method="blocked", **options)
    assert exact.path == "exact"
    check(exact.nats, expected["nats"])
    check(measured(q, k, method="reference", **options).nats, expected["nats"])


@pytest.mark.parametrize(
    ("dtype", "size", "path", "tolerance"),
    [
        (torch.float64, 1.0, "exact", 1e-11),
        (torch.float32, 1.0, "fused", TOLERANCE),
        (torch.float32, 30.0, "exact", TOLERANCE),
        (torch.float32, 1000.0, "exact", TOLERANCE),
        (torch.bfloat16, 1.0, "fused", TOLERANCE),
        (torch.bfloat16, 100.0, "exact", TOLERANCE),
        (torch.float16, 1.0, "fused", TOLERANCE),
        (torch.float16, 100.0, "exact", TOLERANCE),
    ],
)
@pytest.mark.parametrize("width", [20, 33])
def test_ordinary_and_collapsed_heads_in_every_dtype(dtype, size, path, tolerance, width):
    """Half precision is raised before any sum."""
    q, k = (value.to(dtype) for value in heads(queries=300, size=size, width=width))
    for autocast in (True, False):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            result = measured(q, k, causal=True)
        assert (result.nats.dtype, result.path) == (torch.promote_types(dtype, torch.float32), path)
        check(result.nats, truth(q, k, causal(300, 300))["nats"], tolerance)
        assert (result.nats >= 0).all()


@pytest.mark.parametrize("width", [20, 64, 128])
def test_scores_at_the_fused_limit_are_within_1e_5(width):
    q, k = heads(batch=1, query_heads=8, key_heads=8, queries=1024, width=width)
    request = Request(q, k, width**-0.5, Visibility(1024, 1024, True, None, None, q.device))
    q = q * (0.999 * functional.SCORE_LIMIT / fused.score_bound(request))[..., None, None]
    result = measured(q, k, causal=True)
    assert result.path == "fused"
    check(result.nats, truth(q, k, causal(1024, 1024))["nats"])


@pytest.mark.parametrize("mask", [None, torch.ones(2, 70, dtype=torch.bool)], ids=["causal", "padding"])
def test_broken_and_collapsed_heads_alone_leave_the_fused_path(mask):
    q, k = heads()
    q[1, 2] *= 100
    q[0, 1, 5, 3] = torch.nan
    k[1, 1, 20, 0] = torch.nan  # of query heads 3, 4 and 5
    result = measured(q, k, causal=True, mask=mask, patterns=True)
    spoilt = torch.zeros(2, 6, 70, dtype=torch.bool)
    spoilt[0, 1, 5] = True
    spoilt[1, 3:, 20:] = True
    assert torch.equal(result.counted.cpu(), ~spoilt)
    assert (result.path, result.exact.nonzero().tolist()) == ("fused+exact", [[0, 1], [1, 2], [1, 3], [1, 4], [1, 5]])
    expected = truth(q.nan_to_num(0, 0, 0), k.nan_to_num(0, 0, 0), causal(70, 70))
    for name, tolerance in (("nats", TOLERANCE), ("distance", 2e-4)):
        check(getattr(result, name), expected[name].masked_fill(spoilt, torch.nan), tolerance)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 257])
@pytest.mark.parametrize("width", [20, 33, 64])
@pytest.mark.parametrize("kind", ["full", "causal", "mask"])
def test_the_kernel_answers_with_its_log_sum_exp(rows, width, kind):
    """The private operator of torch: its place, its arguments, the shapes of its answers."""
    q, k = heads(queries=rows, keys=rows, width=width)
    visible = causal(rows, rows) if kind == "causal" else torch.ones(rows, rows, dtype=torch.bool)
    additive = None
    if kind == "mask":
        visible = (torch.rand(rows, rows, generator=torch.Generator().manual_seed(2)) < 0.5).fill_diagonal_(True)
        additive = torch.zeros(1, 1, rows, rows, device=DEVICE).masked_fill_(~visible.to(DEVICE), -torch.inf)
    output, lse = fused.kernel(on_device(q), on_device(k), scale=0.2, causal=kind == "causal", additive_mask=additive)
    k = k.double().repeat_interleave(3, dim=1)
    scores = (0.2 * q.double() @ k.mT).masked_fill(~visible, -torch.inf)
    assert (output.shape, lse.shape) == (q.shape, q.shape[:3])
    check(lse, scores.logsumexp(-1))
    check(output, scores.softmax(-1) @ k)


@pytest.mark.parametrize("layout", ["tokens first", "part of a projection", "odd row stride", "width not last"])
def test_any_layout_in_memory_gives_the_same_entropy(layout):
    q, k = (on_device(value) for value in heads(key_heads=6, width=32))
    plain = attention_entropy(q, k, causal=True).nats
    if layout == "tokens first":
        q, k = (value.transpose(1, 2).contiguous().transpose(1, 2) for value in (q, k))
    elif layout == "part of a projection":
        q, k = torch.cat([q, k, k], dim=-1).split(32, dim=-1)[:2]
    elif layout == "odd row stride":
        q, k = (torch.nn.functional.pad(value, (1, 2))[..., 1:-2] for value in (q, k))
    else:
        q, k = (value.mT.contiguous().mT for value in (q, k))
    torch.testing.assert_close(attention_entropy(q, k, causal=True).nats, plain, atol=2e-6, rtol=0)


@pytest.mark.parametrize("case", ["causal", "full", "padding", "rows", "causal rows", "one mask for all", "window"])
@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize(("width", "keys"), [(33, 45), (64, 45), (64, 53)])
def test_gradients_agree_with_float64(case, key_heads, width, keys):
    _, options, true_options = masked_cases(keys)[case]
    q, k = heads(queries=45, keys=keys, key_heads=key_heads, width=width)
    weights = torch.randn(2, 6, 45, generator=torch.Generator().manual_seed(3))
    exact = [value.double().requires_grad_() for value in (q, k)]
    expected = truth(*exact, **true_options)["nats"]
    (expected.nan_to_num() * weights).sum().backward()
    ours = [on_device(value).requires_grad_() for value in (q, k)]
    result = measured(*ours, differentiable=True, **options)
    check(result.nats, expected.detach())
    torch.where(result.counted, result.nats * on_device(weights), 0.0).sum().backward()
    for name, mine, theirs in zip("qk", ours, exact, strict=True):
        assert mine.grad.isfinite().all(), f"the gradient of {name} has {int((~mine.grad.isfinite()).sum())} non-finite"
        error = (mine.grad.cpu().double() - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < 1e-4, f"gradient of {name}: largest error {float(error):.1e} of the largest gradient"


def peak_mib(work, *, tokens: int, key_heads: int = 8) -> float:
    """Peak of CUDA memory above what the inputs hold, for 8 heads of width 64."""
    q, k = (torch.randn(1, count, tokens, 64, device=DEVICE, requires_grad=True) for count in (8, key_heads))
    work(q[:, :, :64], k[:, :, :64])  # workspaces of libraries
    q.grad = k.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(q, k)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


MATRICES_MIB = 8 * 4096**2 * 4 / MIB


@pytest.mark.parametrize("method", ["auto", "blocked"])
@pytest.mark.parametrize("window", [None, 1000])
def test_memory_is_linear_in_the_context(method, window):
    def work(q, k):
        with torch.no_grad():
            attention_entropy(q, k, causal=True, method=method, window=window, patterns=True)

    half, whole = peak_mib(work, tokens=2048), peak_mib(work, tokens=4096)
    assert whole < MATRICES_MIB / 3, f"{whole:.0f} MiB at T = 4096; the matrices would be {MATRICES_MIB:.0f}"
    assert whole < 2.5 * half, f"{half:.0f} MiB at T = 2048, {whole:.0f} MiB at 4096"


@pytest.mark.parametrize("key_heads", [8, 2])
def test_a_causal_gradient_needs_no_matrices(key_heads):
    def work(q, k):
        attention_entropy(q, k, causal=True, differentiable=True).nats.sum().backward()

    whole = peak_mib(work, tokens=4096, key_heads=key_heads)
    assert whole < MATRICES_MIB / 2, f"{whole:.0f} MiB at T = 4096; the matrices would be {MATRICES_MIB:.0f}"
