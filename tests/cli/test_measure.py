"""`normfree measure`: any model in, the folder of a run and a page out."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import normfree
from normfree.analysis.groups import group_runs
from normfree.cli.main import main
from normfree.store.runs import find_runs, load_runs, read_run
from tests.entropy.families import tiny_model
from tests.entropy.kinds import _sizes, tiny_kind
from tests.measures.byte_model import TEXT, byte_gpt2, byte_tokenizer


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder.parent / "text.py").write_text(TEXT)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(byte_gpt2(), tmp_path / "model")


def measure(folder: Path, *words: str) -> int:
    text, output = folder.parent / "text.py", folder.parent / "measured"
    return main(["measure", str(folder), f"text={text}", "context=32", f"output={output}", *words])


def test_the_command_writes_a_run_folder_and_its_page(saved, tmp_path, capsys) -> None:
    assert measure(saved) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    run = read_run(tmp_path / "measured")
    entropy_LH = np.array(run.last("final", "entropy_nats"))
    assert (run.kind, run.label, entropy_LH.shape) == ("measurement", "model", (3, 2))
    assert f"{entropy_LH[0].mean():.3f}" in out
    assert load_runs(tmp_path / "measured")["label"].tolist() == ["model"]
    page = (tmp_path / "measured" / "report" / "index.html").read_text()
    assert "<svg" in page
    assert f": {run.facts['measurement']['sequences']} windows of 32 tokens" in page
    assert "://" not in page
    assert "SM is softmax attention" not in page  # names of variants
    assert "<title>normfree: model</title>" in page
    assert re.search(r"<dt>Recorded, not drawn</dt><dd>.*Attention rows.* \(numbers/\*\.csv\)</dd>", page)
    for name in ("figures/entropy_nats-heads.png", "tables/layers.csv", "tables/ranges.md", "numbers/heads.csv"):
        assert (tmp_path / "measured" / "report" / name).stat().st_size > 0


def test_an_output_folder_with_something_else_is_refused(saved, tmp_path, capsys) -> None:
    assert measure(saved) == 0
    assert measure(saved) == 0  # the same again
    before = (tmp_path / "measured" / "run.json").read_bytes()
    assert measure(saved, "context=16") == 1
    assert "holds a measurement with another text, context, sequences; name a new" in capsys.readouterr().err
    assert (tmp_path / "measured" / "run.json").read_bytes() == before
    assert measure(saved, f"output={saved}") == 1
    assert f"output={saved} holds something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "second", "names"),
    [
        ("model", "other.py", ["model [text=other.py]", "model [text=text.py]"]),
        ("model", "more/text.py", ["model [text=text.py] (first)", "model [text=text.py] (second)"]),
        ("twin/model", "text.py", ["model (first)", "model (second)"]),
    ],
)
def test_models_and_texts_of_one_name_have_two_labels(other, second, names, saved, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "twin" / "model")
    (tmp_path / second).parent.mkdir(exist_ok=True)
    if second != "text.py":
        (tmp_path / second).write_text(TEXT[::-1])
    for folder, text, output in ((saved, "text.py", "first"), (tmp_path / other, second, "second")):
        assert measure(folder, f"text={tmp_path / text}", f"output={tmp_path / output}") == 0
    assert [group.name for group in group_runs(find_runs([tmp_path / "first", tmp_path / "second"]))] == names


def test_the_page_names_the_bos_token_of_windows(saved, tmp_path, capsys) -> None:
    assert measure(saved, "bos=true") == 1
    assert "the tokenizer has no BOS token" in capsys.readouterr().err
    PreTrainedTokenizerFast.from_pretrained(saved, bos_token="a").save_pretrained(saved)
    assert measure(saved, "bos=true") == 0, capsys.readouterr().err
    assert "each with a first" in (tmp_path / "measured" / "report" / "index.html").read_text()
    assert main(["evaluate", str(saved), f"text={tmp_path / 'text.py'}", "context=32", "bos=true"]) == 0
    assert "every window begins with a)" in capsys.readouterr().out


def test_heads_without_a_finite_row_are_undecided(tmp_path, capsys) -> None:
    model = byte_gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, :16] = math.nan
    assert measure(save(model, tmp_path / "model")) == 0, capsys.readouterr().err
    run = read_run(tmp_path / "measured")
    assert math.isnan(run.last("final", "entropy_nats")[1][0])
    assert run.last("final", "rows")[1][0] == 0
    assert run.last("final", "nonfinite_rows")[1][0] > 0
    assert "| undecided |" in capsys.readouterr().out


def test_an_unrouted_family_is_left_out_or_measured_by_eager(tmp_path: Path, capsys, caplog) -> None:
    folder = save(tiny_model("bloom", vocab_size=256), tmp_path / "m")
    assert measure(folder) == 1
    assert "method='eager'" in capsys.readouterr().err
    assert measure(folder, "method=eager", f"output={tmp_path / 'eager'}") == 0, capsys.readouterr().err
    assert measure(folder, "measures=heads,residual,perplexity") == 0, capsys.readouterr().err
    run = read_run(tmp_path / "measured")
    assert run.last("final", "loss") > 0
    assert len(run.last("final", "residual_rms")) == 2
    assert run.last("final", "entropy_nats") is None
    assert "left out: measure heads: " in caplog.text
    assert "What does each layer do?" in (tmp_path / "measured" / "report" / "index.html").read_text()


def test_heads_that_see_later_tokens_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=64, is_causal=False)
    folder = save(transformers.LlamaForCausalLM(config), tmp_path / "both ways")
    assert measure(folder) == 0
    assert "not causal: queries see later tokens" in capsys.readouterr().out
    assert "not causal: queries see later tokens" in (tmp_path / "measured" / "report" / "index.html").read_text()
    run = read_run(tmp_path / "measured")
    assert not run.facts["measurement"]["causal"]
    assert run.last("final", "ceiling_nats") == pytest.approx([math.log(32)])
    assert main(["evaluate", str(folder), f"text={tmp_path / 'text.py'}"]) == 1
    assert "LlamaForCausalLM is not causal: later tokens change" in capsys.readouterr().err
    assert measure(folder, "measures=perplexity", f"output={tmp_path / 'second'}") == 1
    assert "LlamaForCausalLM is not causal: later tokens change" in capsys.readouterr().err


def test_a_model_without_attention_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.MambaConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, state_size=4)
    folder = save(transformers.MambaForCausalLM(config), tmp_path / "m")
    assert measure(folder) == 1
    assert "mamba has no softmax attention" in capsys.readouterr().err
    assert not (tmp_path / "measured").exists()
    words = ["evaluate", str(folder), f"text={tmp_path / 'text.py'}", "context=16"]
    assert main(words) == 0, capsys.readouterr().err


def tiny(family: str) -> PreTrainedModel:
    text = _sizes(transformers.CLIPTextConfig) | {"vocab_size": 256}
    own = {"vit": {}, "clip": {"text_config": text}}
    model = tiny_kind(family, **own.get(family, {"vocab_size": 256}))
    return transformers.T5ForConditionalGeneration(model.config) if family == "t5" else model


def saved_model(family: str, parent: Path) -> Path:
    """The model with what must lie beside it, a text, a target and a folder of three images."""
    folder = save(tiny(family), parent / family)
    (parent / "target.py").write_text(TEXT[::-1])
    if family in ("vit", "clip"):
        image = pytest.importorskip("PIL.Image", reason="images need Pillow")
        (parent / "images" / "more").mkdir(parents=True)
        for name in ("b", "a", "more/c"):
            image.new("L", (20, 30), color=len(name) * 40).save(parent / "images" / f"{name}.png")
        (parent / "images" / "labels.csv").write_text("a,1")
        transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


BOTH_STACKS = [f"{group} {layer}" for group in ("encoder", "decoder", "cross") for layer in (0, 1)]
BOTH_TOWERS = ["vision 0", "vision 1", "text 0", "text 1"]
FULL, CAUSAL, PATCHES = [math.log(16)] * 2, [math.lgamma(17) / 16] * 2, [math.log(17)] * 2


@pytest.mark.parametrize(
    ("family", "keys", "layers", "ceilings"),
    [
        pytest.param("bert", "text=text.py context=32", [0, 1], [math.log(32)] * 2, marks=pytest.mark.slow),
        ("vit", "images=images", [0, 1], PATCHES),
        ("t5", "text=text.py target=target.py context=16", BOTH_STACKS, FULL + CAUSAL + FULL),
        ("clip", "text=text.py images=images context=16", BOTH_TOWERS, PATCHES + CAUSAL),
    ],
)
def test_any_kind_of_model_has_records_and_a_page(family, keys, layers, ceilings, tmp_path, capsys, monkeypatch):
    folder = saved_model(family, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["measure", str(folder), *keys.split(), "output=measured", "batch=2"]) == 0, capsys.readouterr().err
    run = read_run(tmp_path / "measured")
    assert run.layer_numbers("entropy_nats", len(layers)) == layers
    assert run.last("final", "ceiling_nats") == pytest.approx(ceilings)
    assert run.facts["measurement"]["sequences"] == (3 if "images" in keys else 16 if "context=32" not in keys else 14)
    heads = pd.read_csv(tmp_path / "measured" / "report" / "numbers" / "heads.csv")
    assert list(dict.fromkeys(heads["layer"])) == layers
    page = (tmp_path / "measured" / "report" / "index.html").read_text()
    assert "causal ceiling" not in page
    assert "causal ceiling" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("vit", "text=text.py", "text= is a text, and ViTModel reads none: give images="),
        ("vit", "images=empty", "images=empty holds no image"),
        ("vit", "images=broken", "broken/0.png cannot be read as an image"),
        ("vit", "images=images context=8", "context= cuts a text, and ViTModel reads none"),
        ("bert", "text=text.py images=empty", "images= is images, and BertModel reads none: give text="),
        ("bert", "text=text.py target=text.py", "target= is the target of an encoder-decoder, and BertModel"),
        ("t5", "text=text.py", "reads the target of an encoder-decoder: give text= and target="),
        ("t5", "text=text.py target=nowhere.py", "target=nowhere.py cannot be read"),
        ("t5", "text=text.py target=text.py measures=perplexity", "a causal language-model head"),
        ("clip", "text=text.py", "CLIPModel reads images: give text= and images="),
        ("whisper", "text=text.py", "reads input_features, which the command has no key for"),
    ],
)
def test_keys_that_do_not_fit_the_model_are_refused(family, keys, message, tmp_path, capsys, monkeypatch) -> None:
    folder = saved_model(family, tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    assert main(["measure", str(folder), *keys.split(), "output=measured"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "measured").exists()


def test_any_inputs_of_a_model_are_measured_in_python() -> None:
    with pytest.raises(ValueError, match="ViTModel reads pixel_values, no text"):
        normfree.measure(tiny("vit").eval(), torch.arange(8))
    patches = normfree.measure(tiny("vit").eval(), {"pixel_values": torch.rand(2, 3, 16, 16)})
    assert patches["rows"].tolist() == [[34] * 4] * 2
    ids_BT = torch.arange(3, 23).view(2, 10)
    inputs = {"input_ids": ids_BT, "decoder_input_ids": ids_BT[:, :4]}
    table = normfree.measure(tiny("t5").eval(), inputs, ["heads", "logits"]).to_frame()
    assert table["layer"].unique().tolist() == BOTH_STACKS
    assert table["max_logit"].notna().all()
