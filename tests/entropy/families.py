"""Tiny random models of the causal-LM families that the installed transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 96
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "sliding_window": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_LATENT = {"num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm_moe_dsa": _LATENT,
    "glm4_moe_lite": _LATENT,
    "youtu": _LATENT,
    "minicpm3": _LATENT,
    "longcat_flash": _LATENT,
}


def tiny_config(model_type: str, **own: Any) -> PreTrainedConfig:
    """The family's configuration, shrunk; `own`: other values for this one."""
    config_class = CONFIG_MAPPING[model_type]
    known = {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    attributes = set(config_class.attribute_map.values()) | known
    asked: dict[str, Any] = {
        name: value for name, value in TINY.items() if name in attributes and name not in config_class.attribute_map
    }
    asked |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "is_decoder": True}
    return config_class(**asked | OWN.get(model_type, {}) | own)


def tiny_model(model_type: str, **own: Any) -> PreTrainedModel:
    """A random model in eval mode whose heads are neither uniform nor collapsed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **own)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model
