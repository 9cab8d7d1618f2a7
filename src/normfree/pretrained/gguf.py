"""Keys and weights of .gguf files that transformers 5.23 does not read: correct them where possible, else refuse."""

from collections.abc import Iterator
from math import isclose
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

_SPLIT_LIKE_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo"}
_SPLIT_DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""Each digit is a word of its own, the rest is split as in GPT-2: one entry in llama.cpp's table of pre-tokenizers."""
_HARMLESS = {
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),  # always read
    *("attention.layer_norm_epsilon", "attention.value_length", "rope.dimension_sections"),
    *("rope.scaling.finetuned", "rope.scaling.original_context_length"),  # without effect unless there is a factor
}


def correct_or_refuse(path: Path, model: Any, tokenizer: Any) -> None:
    """Split text as the file says. Raises ValueError if a key or weight that changes numbers was not read."""
    metadata, tensors = read_gguf_metadata(str(path))
    architecture = metadata["general.architecture"]
    unread = list(_unread_keys(metadata, architecture, model.config))
    if architecture not in GGUF_CONFIG_ARCHS:  # for those the loader reports weights without a place itself
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
        places = get_gguf_hf_weights_map(model, processor)
        unread += [name for name in tensors if name not in places and name.removesuffix(".weight") not in places]
    if not (path.parent / "tokenizer.json").is_file():  # which replaces the file's own
        unread += _correct_split(metadata, tokenizer)
    if unread:
        raise ValueError(
            f"{path} holds {', '.join(unread[:3])}, which transformers does not read, so numbers would be wrong; give "
            "the folder or the hub name that the file was made from"
        )


def _unread_keys(metadata: dict[str, Any], architecture: str, config: Any) -> Iterator[str]:
    """The keys of attention and positions that differ from the loaded config; shapes do not reveal these."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope = rope | rope.get("full_attention", {})
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    loaded: dict[str, Any] = {
        "rope.freq_base": rope.get("rope_theta"),
        "rope.scaling.type": rope.get("rope_type"),
        "rope.scaling.factor": rope.get("factor"),
        "rope.dimension_count": round(head * rope.get("partial_rotary_factor", 1.0)),
        "attention.key_length": head,
        "attention.causal": getattr(config, "is_causal", True),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    for key, value in metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name.startswith(("rope.", "attention.", "attn_", "final_")) and name not in _HARMLESS:
            ours, theirs = loaded.get(name), "default" if value == "none" else value
            if isinstance(ours, int | float) and isinstance(theirs, float):  # which the file rounds to fp32
                theirs = ours if isclose(ours, theirs, rel_tol=1e-6) else theirs
            if ours != theirs:
                yield f"{key}={value}"


def _correct_split(metadata: dict[str, Any], tokenizer: Any) -> list[str]:
    """Give a byte-level tokenizer the file's pre-tokenizer; return the keys that are unknown or were not read."""
    if metadata["tokenizer.ggml.model"] == "gpt2":
        default = "gpt-2" if metadata["general.architecture"] == "gpt2" else None
        split = metadata.get("tokenizer.ggml.pre", default)
        if split in _SPLIT_DIGITS_FIRST:
            parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        elif split not in _SPLIT_LIKE_GPT2 and split not in GGUF_PRE_TOKENIZER_SPLITS:
            return [f"tokenizer.ggml.pre={split}"]
    elif metadata.get("tokenizer.ggml.add_space_prefix") is False and tokenizer.tokenize("a")[0].startswith("\u2581"):
        return ["tokenizer.ggml.add_space_prefix=False"]
    return []
