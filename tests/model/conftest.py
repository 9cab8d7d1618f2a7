"""Small models for the tests of this room."""

import pytest
import torch

from normfree.model import NormFreeConfig, NormFreeForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


@pytest.fixture
def build():
    """`build(**fields)`: a small model in eval mode whose weights are far from their start."""

    def make(*, seed=0, attention="sdpa", **fields):
        torch.manual_seed(seed)
        config = NormFreeConfig(**(SIZES | fields))
        model = NormFreeForCausalLM._from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.endswith("slope"):
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model

    return make


@pytest.fixture
def ids():
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(3))
