"""Which model families can be measured how, as data.

These are the causal-LM types of transformers 5.23; a test compares them with the installed version. A type
that is not listed, such as one of your own, is measured if its attention looks its function up in
`ALL_ATTENTION_FUNCTIONS`: the modules are asked, these tables only explain refusals and are documentation.
"""

from __future__ import annotations


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


ROUTED = _types("""
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert bert-generation
    bigbird_pegasus biogpt bitnet blenderbot blenderbot-small camembert cohere cohere2
    cohere2_moe cohere_compass_text ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 diffllama doge dots1 dots3_note dots3_note_text electra emu3 ernie ernie4_5
    ernie4_5_moe exaone4 exaone_moe falcon_h1 flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text
    gemma3n gemma3n_text gemma4 gemma4_assistant gemma4_text gemma4_unified gemma4_unified_assistant
    gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2
    gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax
    inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna
    lfm2 lfm2_moe lfm3 llama llama4 llama4_text longcat_flash marian mbart mellum mimo_v2_flash
    minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama
    modernbert-decoder moshi moss_transcribe_diarize musicgen musicgen_melody nanochat nemotron
    nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt pegasus persimmon phi phi3 phi4_multimodal
    phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe
    qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma roberta roberta-prelayernorm roc_bert
    seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma whisper xlm-roberta xlm-roberta-xl
    xmod youtu zaya
""")
"""Attention looks its function up in the registry: method='auto'."""

EAGER_ONLY = _types("""
    big_bird bloom codegen falcon git gpt_neo gpt_neox_japanese gptj megatron-bert mpt mvp
    openai-gpt prophetnet rembert roformer trocr xglm xlm xlnet zamba zamba2
""")
"""Softmax attention that the registry does not serve, or whose modules do not say their layer: method='eager', O(T^2)
memory."""

NO_SOFTMAX = _types("""
    falcon_mamba mamba mamba2 rwkv xlstm
""")
"""Recurrent: there is no attention row to have an entropy."""

NOT_MEASURED = {
    "blt": "has parts side by side that number their layers alike",
    "cpmant": "cuts the columns of its prompt off the matrices that it returns",
    "hrm_text": "has two stacks that number their layers alike",
    "reformer": "attends within hashed buckets",
}
"""Softmax attention that neither way reads, and why."""

CROSS_ATTENTION_NAMES = frozenset(
    {"crossattention", "cross_attn", "cross_attn_layers", "cross_attention", "encoder_attn", "EncDecAttention"}
)
"""Submodule names of attention over another sequence; a causal LM's heads are its self-attention."""


class UnsupportedModel(ValueError):  # noqa: N818 - the message is the point, not the suffix
    """The model has no attention that a probe can measure this way; the message says what to do."""


def without_rows(model_type: str) -> str | None:
    """Why no probe measures this type, whatever the method: one line, or None."""
    if model_type in NO_SOFTMAX:
        return f"{model_type} has no softmax attention, so it has no entropy; choose another model"
    if model_type in NOT_MEASURED:
        return f"{model_type} {NOT_MEASURED[model_type]}, which is not measured; choose another model"
    return None


def refusal(model_type: str) -> str:
    """Why the registry gives nothing to measure in a model of this type, and what to do: one line."""
    if model_type in ROUTED:
        return (
            f"this {model_type} has no attention module that says its layer (its config says which layers attend), so "
            "there is nothing to measure"
        )
    return f"{model_type} does not route through AttentionInterface; pass method='eager' (O(T^2) memory)"
