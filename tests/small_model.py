"""A small model of ours whose weights are far from their start."""

from __future__ import annotations

from typing import Any

import torch

from normfree.model import NormFreeConfig, NormFreeForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def small_model(*, seed: int = 0, attention: str = "sdpa", spread: float = 0.2, **fields: Any) -> NormFreeForCausalLM:
    """On the CPU, in evaluation mode; `spread` is the standard deviation of what is added to its first weights."""
    torch.manual_seed(seed)
    config = NormFreeConfig(**(SIZES | fields))
    model = NormFreeForCausalLM._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("slope"):
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model
