"""attention_entropy on CUDA: every test of the CPU, and memory."""

import pytest
import torch

from normfree.entropy import attention_entropy
from tests.entropy.test_functional import *  # noqa: F403 - collected here too, with the device of this folder

DEVICE = "cuda"
MIB = 2**20


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
