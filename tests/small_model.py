"""A small model whose weights are far from their initial values."""

from typing import Any

import torch

from normfree.model import HEADS, NormFreeConfig, NormFreeForCausalLM

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES = SMALL | {"vocab_size": 61, "max_position_embeddings": 32}
CHOICES: list[dict[str, Any]] = [
    {
        "norm": "dyt", "placement": "peri", "query_key_norm": "rmsnorm", "branch": "layerscale",
        "attention_temperature": "head", "attention_gate": "head", "embedding_scale": "learned",
    },
    {
        "norm": "taper", "taper_end_step": 8, "placement": "mix", "linear": "spectral_norm",
        "attention_sink": "learned", "attention_gate": "channel", "attention_temperature": "position",
        "branch": "scaled_ffn",
    },
    {
        "norm": "rmsnorm", "placement": "post", "position": "rotary", "attention_sink": "softmax_1",
        "linear": "weight_norm", "branch": "rezero",
    },
]  # fmt: skip
"""Models that between them take most entries of the tables of choices."""


def with_noise(model: Any, spread: float = 0.2) -> Any:
    """The model in evaluation mode, with noise of standard deviation `spread` on every weight but slopes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("slope"):
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.eval()


def family_model(family: str, **fields: Any) -> Any:
    """Another family's model, with noise on every weight."""
    torch.manual_seed(0)
    kind = HEADS[family]
    return with_noise(kind._from_config(kind.config_class(**SMALL | fields)))


def small_model(*, seed: int = 0, attention: str = "sdpa", spread: float = 0.2, **fields: Any) -> NormFreeForCausalLM:
    """On the CPU, in evaluation mode, with noise of standard deviation `spread` added to its initial weights."""
    torch.manual_seed(seed)
    config = NormFreeConfig(**(SIZES | fields))
    model = with_noise(NormFreeForCausalLM._from_config(config, attn_implementation=attention), spread)
    for name, buffer in model.named_buffers():
        if name.endswith(("share", "mean_inverse_rms")):
            buffer.fill_(0.6)
    return model
