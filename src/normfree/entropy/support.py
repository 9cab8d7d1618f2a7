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

NO_SOFTMAX = frozenset({"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"})
"""Recurrent: there is no attention row to have an entropy."""

NOT_MEASURED = {
    "blt": "reads bytes in patches, and which patches are padding is not known",
    "cpmant": "cuts the columns of its prompt off its matrices",
    "reformer": "attends within hashed buckets",
}
"""Softmax attention that neither method reads, and why."""

ROUTED = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - EAGER_ONLY - NO_SOFTMAX - NOT_MEASURED.keys()
"""Attention uses the registry: method='auto'."""

CROSS_ATTENTION_NAMES = frozenset(
    {"crossattention", "cross_attn", "cross_attn_layers", "cross_attention", "encoder_attn", "EncDecAttention"}
)
"""Submodule names of attention over another sequence."""


class UnsupportedModel(ValueError):  # noqa: N818 - the message is the point, not the suffix
    """The model has no attention that can be measured this way; the message says what to do."""


def without_rows(model_type: str) -> str | None:
    """Why this type cannot be measured by any method, or None."""
    if model_type in NO_SOFTMAX:
        return f"{model_type} has no softmax attention, so it has no entropy; choose another model"
    if model_type in NOT_MEASURED:
        return f"{model_type} {NOT_MEASURED[model_type]}, so it is not measured; choose another model"
    return None


def refusal(model_type: str) -> str:
    """Why a model of this type has no attention in the registry, and what to do."""
    if model_type in ROUTED:
        return f"this {model_type} has no attention module (see its config): nothing to measure"
    return f"not all heads of {model_type} are routed through AttentionInterface; pass method='eager' (O(T^2) memory)"
