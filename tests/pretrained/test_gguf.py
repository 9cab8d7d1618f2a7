"""Keys and weights of .gguf files that transformers does not read are corrected or refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from normfree.pretrained.load import load_pretrained

gguf = pytest.importorskip("gguf", reason="the extra gguf")


def write_model(
    path: Path, *keys: tuple[str, Any], weights: tuple[tuple[str, int], ...] = (), vocabulary: str = "gpt2"
) -> Path:
    """One random Llama layer of two heads; `keys` come last, those of the model without their prefix."""
    writer = gguf.GGUFWriter(str(path), "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 16, "feed_forward_length": 32}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 8}
    values: dict[str, Any] = {"general.name": "tiny", "tokenizer.ggml.model": vocabulary, "tokenizer.ggml.pre": "gpt-2"}
    values |= {f"llama.{name}": value for name, value in sizes.items()}
    values |= {"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 50000.0}
    values |= {key if key.startswith("tokenizer.") else f"llama.{key}": value for key, value in keys}
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in values.items():
        if value is not None:
            kinds[type(value)](key, value)
    if vocabulary == "gpt2":
        tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12"]
        writer.add_token_merges(["1 2"])
    else:
        tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_unk_token_id(0)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    shapes: dict[str, tuple[int, ...]] = {name: (len(tokens), 16) for name in ("token_embd.weight", "output.weight")}
    shapes |= dict.fromkeys(("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"), (16,))
    shapes |= {f"blk.0.attn_{name}.weight": (16, 16) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_up.weight": (32, 16), "blk.0.ffn_gate.weight": (32, 16), "blk.0.ffn_down.weight": (16, 32)}
    shapes |= {name: (size,) for name, size in weights}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "yarn"),
        ("rope.scaling.factor", 4.0),
        ("attention.causal", False),
        ("attention.sliding_window", 16),
        ("attention.scale", 0.5),
        ("attn_logit_softcapping", 50.0),
        ("tokenizer.ggml.pre", "falcon"),
        ("tokenizer.ggml.pre", None),
    ],
)
def test_an_unread_key_is_refused_by_name_and_value(tmp_path: Path, key: str, value: object) -> None:
    path = write_model(tmp_path / "m.gguf", (key, value))
    with pytest.raises(ValueError, match=re.escape(f"{key}={value}, which transformers does not read")):
        load_pretrained(str(path))


@pytest.mark.parametrize(("weight", "size"), [("rope_freqs.weight", 4), ("blk.0.attn_q.bias", 16)])
def test_an_unread_weight_is_refused_by_name(tmp_path: Path, weight: str, size: int) -> None:
    path = write_model(tmp_path / "m.gguf", weights=((weight, size),))
    with pytest.raises(ValueError, match=re.escape(f"holds {weight}, which")):
        load_pretrained(str(path))


def test_keys_that_agree_with_the_config_are_accepted(tmp_path: Path) -> None:
    keys = [("rope.scaling.type", "none"), ("attention.key_length", 8), ("attention.value_length", 8)]
    keys += [("attention.causal", True), ("rope.scaling.original_context_length", 64), ("rope.freq_base", 1e6 / 3)]
    model, _ = load_pretrained(str(write_model(tmp_path / "m.gguf", *keys)))
    assert model.config.rope_parameters["rope_theta"] == pytest.approx(1e6 / 3)


@pytest.mark.parametrize(
    ("split", "tokens"),
    [
        ("gpt-2", ["Ġ", "12", "Ġ", "3", ".", "12", "a", "12"]),
        ("llama-bpe", ["Ġ", "12", "Ġ", "3", ".", "12", "a", "12"]),
        ("smollm", ["Ġ", "1", "2", "Ġ", "3", ".", "1", "2", "a", "1", "2"]),  # GPT-2 leaves the last blank to a word
        ("starcoder", ["Ġ", "1", "2", "Ġ", "3", ".", "1", "2", "a", "1", "2"]),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path: Path, split: str, tokens: list[str]) -> None:
    _, tokenizer = load_pretrained(str(write_model(tmp_path / "m.gguf", ("tokenizer.ggml.pre", split))))
    assert tokenizer.tokenize(" 12 3.12a12") == tokens


def test_a_prefix_blank_against_the_file_is_refused(tmp_path: Path) -> None:
    keys = [("tokenizer.ggml.pre", "default"), ("tokenizer.ggml.add_space_prefix", True)]
    load_pretrained(str(write_model(tmp_path / "m.gguf", *keys, vocabulary="llama")))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.add_space_prefix=False"):
        load_pretrained(str(write_model(tmp_path / "m.gguf", (keys[0]), (keys[1][0], False), vocabulary="llama")))


def test_a_tokenizer_beside_the_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    load_pretrained(str(path))[1].save_pretrained(tmp_path)
    write_model(path, ("tokenizer.ggml.pre", "falcon"))
    assert load_pretrained(str(path))[1].tokenize(" 12") == ["Ġ", "12"]
