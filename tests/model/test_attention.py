"""Explicit attention: what it computes, and how exactly in bf16."""

import pytest
import torch
import torch.nn.functional as F

from normfree.model import attention


def written_out(query, key, value, *, causal=True):
    part = torch.nn.Module()
    part.is_causal = causal
    return attention.written_out_attention(part, query, key, value, None, scaling=0.3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 31, attention.LONGEST_WRITTEN_OUT])
def test_written_out_attention_is_softmax_attention(tokens, causal):
    query, key, value = torch.randn(3, 2, 4, tokens, 8, generator=torch.Generator().manual_seed(1))
    mixed, weights = written_out(query, key, value, causal=causal)
    truth = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(mixed, truth, atol=2e-6, rtol=1e-5)


def test_written_out_attention_in_bf16_has_gradients_of_float64():
    exact = torch.randn(3, 2, 4, 128, 8, generator=torch.Generator().manual_seed(1)).bfloat16().double()

    def gradient(attend, inputs):
        inputs = inputs.detach().requires_grad_()
        attend(*inputs).square().sum().backward()
        return inputs.grad.double()

    truth = gradient(lambda *parts: F.scaled_dot_product_attention(*parts, is_causal=True, scale=0.3), exact)
    error = gradient(lambda *parts: written_out(*parts)[0], exact.bfloat16()) - truth
    assert error.norm() < 0.01 * truth.norm()  # a bf16 number is good to 0.4 %
