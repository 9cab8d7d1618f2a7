"""Tiny random models of the causal-LM families that the installed transformers knows."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 96
SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd",
    2: "num_hidden_layers num_layers decoder_layers encoder_layers n_layer num_key_value_heads num_experts_per_tok",
    4: "num_attention_heads num_heads decoder_attention_heads encoder_attention_heads n_head mamba_n_heads "
    "num_experts num_local_experts n_routed_experts",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim hidden_size_per_layer_input mamba_d_state "
    "mamba_chunk_size",
    48: "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim n_inner",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank mamba_d_head",
    1: "n_group topk_group",
    64: "max_position_embeddings n_positions n_ctx",
    6: "sliding_window",
}
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
LATENT = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "youtu")
LATENT += ("minicpm3", "longcat_flash")
"""Families whose latent attention has no grouped queries."""


def known_sizes(config_class: type[PreTrainedConfig], sizes: dict[str, Any]) -> dict[str, Any]:
    """Those that the class has a field for."""
    known = {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    names = (known | {*config_class.attribute_map.values()}) - {*config_class.attribute_map}
    return {name: size for name, size in sizes.items() if name in names}


def tiny_config(model_type: str, **own: Any) -> PreTrainedConfig:
    """The family's configuration, shrunk; `own` has other values for this one."""
    config_class = CONFIG_MAPPING[model_type]
    fields = known_sizes(config_class, TINY) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    fields |= {"is_decoder": True} | ({"num_key_value_heads": 4} if model_type in LATENT else {})
    return config_class(**fields | own)


def tiny_model(model_type: str, **own: Any) -> PreTrainedModel:
    """A random model in eval mode whose heads are neither uniform nor collapsed."""
    torch.manual_seed(0)
    return with_large_weights(AutoModelForCausalLM.from_config(tiny_config(model_type, **own)).eval())


def with_large_weights(model: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model
