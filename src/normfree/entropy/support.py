"""How each causal-LM type of transformers 5.23 can be measured; a test compares it with the installed source.

The tables document and explain refusals: any other type is measured if its modules use `ALL_ATTENTION_FUNCTIONS`.
"""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_EAGER_NAMES = """
    big_bird bloom codegen falcon git gpt_neo gpt_neox_japanese gptj megatron-bert mpt mvp
    openai-gpt prophetnet rembert roformer trocr xglm xlm xlnet zamba zamba2
"""
EAGER_ONLY = frozenset(_EAGER_NAMES.split())
"""Softmax attention outside the registry, or in modules that several layers share: method='eager', O(T^2) memory."""

NOT_MEASURED = dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"), "has no softmax attention") | {
    "blt": "reads bytes in patches, and which patches are padding is not known",
    "cpmant": "cuts the columns of its prompt off its matrices",
    "reformer": "attends within hashed buckets",
}
"""Types of models that neither method reads, and the reason."""

ROUTED = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - EAGER_ONLY - NOT_MEASURED.keys()
"""Attention uses the registry: method='auto'."""

CROSS_ATTENTION_NAMES = frozenset(
    {"crossattention", "cross_attn", "cross_attn_layers", "cross_attention", "encoder_attn", "EncDecAttention"}
)


class UnsupportedModel(ValueError):  # noqa: N818 - the message is the point, not the suffix
    """The model has no attention that can be measured this way; the message says what to do."""
