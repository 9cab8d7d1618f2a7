"""The fused path: torch's private kernel, and how its inputs lie in memory."""

from __future__ import annotations

import pytest
import torch

from normfree.entropy import attention_entropy
from normfree.entropy.fused import has_kernel, kernel
from tests.entropy.truths import causal, check, truth


def test_private_kernel_exists_and_agrees_with_the_definition():
    q, k = torch.randn(2, 2, 9, 16), torch.randn(2, 1, 9, 16)
    assert has_kernel(q)
    output, lse = kernel(q, k, scale=0.3, causal=True)
    scores = (q @ k.mT * 0.3).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(output, scores.softmax(-1) @ k, atol=1e-5, rtol=0)


@pytest.mark.parametrize("which", ["q", "k", "both"])
@pytest.mark.parametrize("layout", ["tokens first", "width first"])
def test_any_layout_in_memory_gives_the_same_entropy(which, layout):
    """torch's private kernel reads the numbers of a row as neighbours, wherever they lie."""
    q, k = (torch.randn(2, 4, 70, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    laid = {
        "tokens first": lambda value: value.transpose(1, 2).contiguous().transpose(1, 2),
        "width first": lambda value: value.mT.contiguous().mT,
    }[layout]
    result = attention_entropy(q if which == "k" else laid(q), k if which == "q" else laid(k), causal=True)
    assert result.path == "fused"
    check(result.nats, truth(q, k, causal(70, 70))["nats"])
