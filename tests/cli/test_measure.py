"""`normfree measure`: any language model in, the folder of a run and a page out."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
    Trainer,
    TrainingArguments,
    XLNetConfig,
    XLNetLMHeadModel,
)

from normfree.analysis.groups import group_runs
from normfree.cli.main import main
from normfree.measures.measurement import MeasureCallback, measure
from normfree.measures.windows import memory_estimate, token_windows
from normfree.pretrained.load import load_pretrained, outline
from normfree.store.runs import find_runs, load_runs, read_run

TEXT = "def measured(x):\n    return [y * y for y in x if y > 0]\n" * 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=3, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config)


@pytest.fixture
def saved(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.py").write_text(TEXT)
    return tmp_path / "model"


def test_the_numbers_are_those_of_the_models_own_attention_matrices(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    windows_NT = token_windows(model, tokenizer, TEXT, context=32, sequences=4)
    measured = measure(model, windows_NT, batch=3)
    model.set_attn_implementation("eager")
    model.eval()
    with torch.no_grad():
        attentions = model(windows_NT, output_attentions=True).attentions
    for layer, p_BHTS in enumerate(attentions):
        expected_H = torch.special.entr(p_BHTS.double()).sum(-1).mean((0, 2))
        assert measured["entropy_nats"][layer] == pytest.approx(expected_H.tolist(), abs=2e-5)
        first_H = p_BHTS[..., 0].double().mean((0, 2))
        assert measured["first_token_mass"][layer] == pytest.approx(first_H.tolist(), abs=1e-5)
        back_TS = torch.arange(32)[:, None] - torch.arange(32)
        distance_H = (p_BHTS.double() * back_TS).sum(-1).mean((0, 2))
        assert measured["distance_tokens"][layer] == pytest.approx(distance_H.tolist(), abs=1e-4)
    assert measured["ceiling_nats"] == pytest.approx([math.lgamma(33) / 32] * 3)
    assert measured["rows"].tolist() == [[4 * 32] * 2] * 3


def test_windows_are_spread_over_the_text_and_fit_the_model(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    windows_NT = token_windows(model, tokenizer, TEXT, context=16, sequences=3)
    whole = len(ids) // 16
    assert windows_NT[0].tolist() == ids[:16]
    assert windows_NT[-1].tolist() == ids[16 * (whole - 1) : 16 * whole]
    assert token_windows(model, tokenizer, TEXT, context=None, sequences=1).shape == (1, 64)
    assert token_windows(model, tokenizer, "short", context=64, sequences=9).shape == (1, 5)


def test_a_window_begins_with_the_bos_token_that_is_asked_for(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    with_bos = copy.deepcopy(tokenizer)
    with_bos.bos_token = "a"
    windows_NT = token_windows(model, with_bos, TEXT, context=16, sequences=2, bos=True)
    assert windows_NT.shape == (2, 16)
    assert windows_NT[:, 0].tolist() == [with_bos.bos_token_id] * 2
    assert windows_NT[0, 1:].tolist() == ids[:15]


@pytest.mark.parametrize(
    ("text", "context", "sequences", "message"),
    [
        ("a", None, 1, r"has 1 token\(s\); at least 2"),
        (TEXT, 65, 1, "context=65 must be between 2 and the model's 64"),
        (TEXT, 1, 1, "context=1 must be"),
        (TEXT, 8, 0, "sequences=0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    context: int | None,
    sequences: int,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        token_windows(model, tokenizer, text, context=context, sequences=sequences)


def test_a_batch_of_no_windows_is_refused(model: GPT2LMHeadModel) -> None:
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        measure(model, torch.zeros(2, 8, dtype=torch.long), batch=0)


def test_the_estimate_grows_linearly_with_the_context_and_with_its_square_in_eager(model: GPT2LMHeadModel) -> None:
    linear = [memory_estimate(model, batch=1, context=t, method="auto") for t in (1000, 2000, 3000)]
    square = [memory_estimate(model, batch=1, context=t, method="eager") for t in (1000, 2000, 3000)]
    assert linear[2] - linear[1] == linear[1] - linear[0]
    assert square[2] - square[1] > 1.5 * (square[1] - square[0])
    model.set_attn_implementation("eager")  # as gemma2 and gpt_oss are loaded: it makes T x T matrices of its own
    own = [memory_estimate(model, batch=1, context=t, method="auto") for t in (1000, 2000, 3000)]
    assert own[0] - linear[0] == 3 * model.config.n_head * 1000**2 * 4
    assert own[2] - own[1] > 1.5 * (own[1] - own[0])


def test_the_estimate_takes_the_widest_layer_of_a_model_that_lists_them() -> None:
    """3 activations of 64 instead of 48 elements, 4 bytes each, for 32 tokens; and the weights of one such layer."""
    sizes, weights = [], []
    for widths in ([48, 48], [48, 64]):
        config = Gemma3nTextConfig(
            vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, intermediate_size=widths,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=2,
            layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0, 0.0],
        )  # fmt: skip
        model = Gemma3nForCausalLM(config)
        sizes.append(memory_estimate(model, batch=1, context=32, method="auto"))
        weights.append(4 * model.num_parameters())
    assert sizes[1] - sizes[0] == 32 * 3 * (64 - 48) * 4 + weights[1] - weights[0]


def measured_by_command(saved: Path, *words: str) -> int:
    text, output = saved.parent / "text.py", saved.parent / "measured"
    return main(["measure", str(saved), f"text={text}", "context=32", f"output={output}", *words])


def test_the_command_writes_a_run_folder_and_its_page(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert measured_by_command(saved) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    run = read_run(tmp_path / "measured")
    entropy_LH = np.array(run.last("final", "entropy_nats"))
    assert (run.kind, run.label, entropy_LH.shape) == ("measurement", "model", (3, 2))
    assert f"{entropy_LH[0].mean():.3f}" in out
    assert re.search(r"windows of up to 32 tokens: about \S+ [GM]iB needed by this process", caplog.text)
    (row,) = load_runs(tmp_path / "measured").to_dict("records")
    assert row["label"] == "model"
    page = (tmp_path / "measured" / "report" / "index.html").read_text()
    assert "<svg" in page
    assert f": {run.facts['measurement']['sequences']} windows of 32 tokens" in page
    assert "://" not in page
    for name in ("figures/entropy_nats-heads.png", "tables/layers.csv", "tables/ranges.md", "numbers/heads.csv"):
        assert (tmp_path / "measured" / "report" / name).stat().st_size > 0


@pytest.mark.slow
def test_two_models_are_compared_head_by_head(
    saved: Path, model: GPT2LMHeadModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured_by_command(saved) == 0
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[:, 16:32] *= 3  # queries of head 1 of layer 1
    model.save_pretrained(tmp_path / "other")
    PreTrainedTokenizerFast.from_pretrained(saved).save_pretrained(tmp_path / "other")
    assert main(["measure", str(tmp_path / "other"), f"text={tmp_path / 'text.py'}", "context=32",
                 f"output={tmp_path / 'second'}"]) == 0  # fmt: skip
    capsys.readouterr()
    folders = [str(tmp_path / "measured"), str(tmp_path / "second")]
    assert main(["report", *folders, f"output={tmp_path / 'both'}"]) == 0, capsys.readouterr().err
    first, *_ = (tmp_path / "both" / "tables" / "movers.csv").read_text().splitlines()[1:]
    a, b = (np.array(run.last("final", "entropy_nats")) for run in find_runs(folders))
    assert first == f"layer 1 head 1,{a[1, 1]:.3f},{b[1, 1]:.3f},{a[1, 1] - b[1, 1]:+.3f}"
    assert (tmp_path / "both" / "figures" / "difference.png").stat().st_size > 0


def test_an_output_folder_with_something_else_is_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured_by_command(saved) == 0
    assert measured_by_command(saved) == 0  # the same again
    before = (tmp_path / "measured" / "run.json").read_bytes()
    assert measured_by_command(saved, "context=16") == 1
    assert "holds a measurement with another text, context, sequences; name a new" in capsys.readouterr().err
    assert (tmp_path / "measured" / "run.json").read_bytes() == before
    assert measured_by_command(saved, f"output={saved}") == 1
    assert f"output={saved} holds something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ("hedas", "unknown measure 'hedas'; did you mean heads?"),
        ("heads,heads", "heads stands twice"),
        ("heads:0", "give NAME or NAME:STEPS"),
    ],
)
def test_wrong_measures_are_refused(
    saved: Path, measures: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured_by_command(saved, f"measures={measures}") == 1
    assert message in capsys.readouterr().err


def test_a_measurement_is_a_table_a_heatmap_and_html(model: GPT2LMHeadModel) -> None:
    ids_T = torch.arange(20)
    measured = measure(model, ids_T, ["heads", "perplexity"])
    frame = measured.to_frame()
    assert len(frame) == 3 * 2
    row = frame[(frame.layer == 2) & (frame["head"] == 1)].iloc[0]
    assert row.entropy_nats == measured["entropy_nats"][2, 1]
    assert row.ceiling_nats == measured["ceiling_nats"][2]
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=ids_T[None], labels=ids_T[None]).loss.item()
    assert float(measured["loss"]) == pytest.approx(loss, rel=1e-6)
    assert "entropy_nats" in measured._repr_html_()
    assert measured.plot("first_token_mass").figure.axes[1].get_xlabel() == "Attention on the first token"
    with pytest.raises(ValueError, match="no number a head is called 'loss'"):
        measured.plot("loss")
    as_inputs = measure(model, {"input_ids": ids_T[None], "attention_mask": torch.ones(1, 20)})
    assert np.allclose(as_inputs["entropy_nats"], measured["entropy_nats"], atol=1e-6)


def test_padding_changes_no_number(model: GPT2LMHeadModel) -> None:
    """Right padding, so that positions stay the same."""
    ids_BT = torch.arange(60).view(3, 20)
    padded_BT = torch.cat([ids_BT, torch.zeros(3, 7, dtype=torch.long)], dim=1)
    mask_BT = (torch.arange(27) < 20).long().expand(3, -1)
    names = ["heads", "perplexity", "residual"]
    plain = measure(model, ids_BT, names, batch=3)
    padded = measure(model, {"input_ids": padded_BT, "attention_mask": mask_BT}, names)
    for name in ("entropy_nats", "loss", "perplexity", "residual_rms", "rows"):
        assert np.allclose(padded[name], plain[name], rtol=1e-5, atol=1e-6), name
    assert padded.to_frame()["perplexity"].unique() == pytest.approx(float(plain["perplexity"]), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ("heads", {"method": "eager"}, "method= is no chosen measure"),
        ("heads", {"logits": {}}, "logits= is no chosen measure"),
    ],
)
def test_options_of_no_measure_are_refused(
    model: GPT2LMHeadModel, words: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(model, torch.arange(8), words, **options)


def test_two_models_of_one_folder_name_stay_two(saved: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(saved, tmp_path / "twin" / "model")
    assert measured_by_command(saved) == 0
    assert measured_by_command(twin, f"text={tmp_path / 'text.py'}", f"output={tmp_path / 'second'}") == 0
    groups = group_runs(find_runs([tmp_path / "measured", tmp_path / "second"]))
    assert [group.name for group in groups] == ["model (measured)", "model (second)"]


def test_the_callback_measures_in_anyones_trainer(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    ids_NT = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids_T, "labels": ids_T} for ids_T in ids_NT]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    before = measure(model, ids_NT)["entropy_nats"]
    callback = MeasureCallback("heads", inputs=ids_NT, every=3)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert list(callback.history) == [0, 3, 4]
    assert np.allclose(callback.history[0]["entropy_nats"], before, atol=1e-6)
    assert np.allclose(callback.history[4]["entropy_nats"], measure(model, ids_NT)["entropy_nats"], atol=1e-6)
    assert len(callback.to_frame()) == 3 * 3 * 2


def test_the_page_says_that_windows_begin_with_a_bos_token(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "measured" / "report" / "index.html"
    assert measured_by_command(saved) == 0, capsys.readouterr().err
    assert "each with" not in page.read_text()
    assert measured_by_command(saved, "bos=true", f"output={tmp_path / 'bos'}") == 1
    assert "the tokenizer has no BOS token" in capsys.readouterr().err
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved, bos_token="a")
    tokenizer.save_pretrained(saved)
    assert measured_by_command(saved, "bos=true", f"output={tmp_path / 'bos'}") == 0, capsys.readouterr().err
    assert "each with a first" in (tmp_path / "bos" / "report" / "index.html").read_text()
    assert main(["evaluate", str(saved), f"text={tmp_path / 'text.py'}", "context=32", "bos=true"]) == 0
    assert "every window begins with a)" in capsys.readouterr().out


def test_a_window_that_has_no_room_for_text_is_refused(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    two_first = copy.deepcopy(tokenizer)
    first = [(token, two_first.convert_tokens_to_ids(token)) for token in ("\u0100", "\u0101")]  # the bytes 0 and 1
    template = processors.TemplateProcessing("\u0100 \u0101 $A", special_tokens=first)
    two_first.backend_tokenizer.post_processor = template
    windows_NT = token_windows(model, two_first, TEXT, context=3, sequences=1)
    assert windows_NT[0].tolist() == [number for _, number in first] + tokenizer("d")["input_ids"]
    with pytest.raises(ValueError, match="context=2 leaves no room for text behind 2 leading tokens"):
        token_windows(model, two_first, TEXT, context=2, sequences=1)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("a layer", r"lacks 12 weights of its model, e\.g\. transformer\.h\.1\."),
        ("half", "cannot load"),
        ("config", "cannot load"),
    ],
)
def test_files_that_make_no_whole_model_are_refused_in_one_line(
    saved: Path, harm: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = saved / "model.safetensors"
    if harm == "a layer":
        kept = {name: value for name, value in load_file(weights).items() if ".h.1." not in name}
        save_file(kept, weights, metadata={"format": "pt"})
    elif harm == "half":
        weights.write_bytes(weights.read_bytes()[:2000])
    else:
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps(config | {"n_layer": "three"}))
    assert main(["evaluate", str(saved), f"text={saved.parent / 'text.py'}"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, last), last


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        ("transformer.h.3.ln_1.weight", True),  # config.json says three layers
        ("transformer.h.0.attn.q_norm.weight", True),
        ("score.weight", True),
        ("lm_head.bias", True),
        ("transformer.h.0.attn.bias", False),
        ("transformer.h.0.attn.masked_bias", False),
        ("transformer.rotary_emb.inv_freq", False),
        ("mtp.layers.0.weight", False),
        ("model.vision_tower.weight", False),
        ("lm_head.weight", False),  # tied
    ],
)
def test_weights_without_a_place_are_refused_unless_known_to_be_unused(
    saved: Path, key: str, refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(saved / "model.safetensors")
    added = weights["transformer.wte.weight"].clone() if key == "lm_head.weight" else torch.ones(32)
    save_file(weights | {key: added}, saved / "model.safetensors", metadata={"format": "pt"})
    assert main(["evaluate", str(saved), f"text={saved.parent / 'text.py'}"]) == refused
    if refused:
        assert f"holds 1 weight(s) without a place in its model, e.g. {key}" in capsys.readouterr().err


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_without_peft_is_refused(
    saved: Path, whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("normfree.pretrained.load.is_peft_available", lambda: False)
    (saved / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gpt2"}))
    if not whole:
        (saved / "config.json").unlink()
    assert main(["evaluate", str(saved), f"text={saved.parent / 'text.py'}"]) == 1
    assert "needs pip install 'peft>=0.17'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers in an old way
def test_an_adapter_is_part_of_the_model(
    saved: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft", reason="the extra adapters")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapted.peft_config["default"].base_model_name_or_path = str(saved)
    adapted.save_pretrained(saved)
    loaded, _ = load_pretrained(str(saved), device="cpu")
    ids_BT = torch.arange(32)[None]
    with torch.no_grad():
        base, wanted, logits = (each.eval()(ids_BT).logits for each in (model, adapted, loaded))
    assert torch.allclose(logits, wanted, atol=1e-5)
    assert not torch.allclose(logits, base, atol=1e-2)
    assert main(["evaluate", str(saved), f"text={saved.parent / 'text.py'}"]) == 0, capsys.readouterr().err


def test_a_model_without_its_tokenizer_is_refused_by_name(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in saved.glob("*token*"):
        file.unlink()
    assert main(["measure", str(saved), f"text={saved.parent / 'text.py'}"]) == 1
    assert f"{saved} has no tokenizer that makes tokens of text" in capsys.readouterr().err


def test_more_memory_than_there_is_is_refused_before_the_work(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("normfree.measures.windows.evaluation_estimate", lambda model, *, context: 2**50 * context)
    monkeypatch.setattr("normfree.pretrained.load.AutoModelForCausalLM.from_pretrained", None)  # no weight is read
    assert main(["evaluate", str(saved), f"text={saved.parent / 'text.py'}"]) == 1
    assert re.search(r"not enough memory: about 671088\d\d\.\d\d GiB needed", capsys.readouterr().err)


def test_there_is_an_estimate_only_where_weights_are_as_large_as_the_config_says(saved: Path) -> None:
    assert outline(str(saved), dtype="fp32").num_parameters() == load_pretrained(str(saved))[0].num_parameters()
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    assert outline(str(saved), dtype="fp32") is None


def test_heads_without_a_finite_row_are_counted_and_never_a_number(
    saved: Path, model: GPT2LMHeadModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, :16] = math.nan
    model.save_pretrained(saved)
    assert measured_by_command(saved) == 0, capsys.readouterr().err
    run = read_run(tmp_path / "measured")
    assert math.isnan(run.last("final", "entropy_nats")[1][0])
    assert run.last("final", "rows")[1][0] == 0
    assert run.last("final", "nonfinite_rows")[1][0] > 0
    assert "| undecided |" in capsys.readouterr().out


def test_the_default_context_fits_models_whose_positions_begin_behind_padding_or_never_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaForCausalLM(RobertaConfig(**sizes, max_position_embeddings=34, pad_token_id=1, is_decoder=True))
    ids_NT = token_windows(roberta, tokenizer, TEXT, context=None, sequences=2)
    assert ids_NT.shape[1] == 32
    assert measure(roberta, ids_NT)["rows"].tolist() == [[64, 64]]
    xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=256, d_model=32, n_layer=1, n_head=2, d_inner=32))
    assert token_windows(xlnet, tokenizer, TEXT, context=40, sequences=1).shape == (1, 40)


def test_a_family_that_does_not_route_says_how_to_measure_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=2)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "text.py").write_text(TEXT)
    words = ["measure", str(tmp_path / "m"), f"text={tmp_path / 'text.py'}", "context=16", f"output={tmp_path / 'h'}"]
    assert main(words) == 1
    assert "method='eager'" in capsys.readouterr().err
    assert main([*words, "method=eager"]) == 0, capsys.readouterr().err


def test_heads_that_see_later_tokens_are_measured_and_called_so(
    saved: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "measured" / "report" / "index.html"
    assert measured_by_command(saved) == 0
    assert "not causal" not in capsys.readouterr().out + page.read_text()
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=64, is_causal=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "both ways")
    tokenizer.save_pretrained(tmp_path / "both ways")
    words = [str(tmp_path / "both ways"), f"text={tmp_path / 'text.py'}", "context=32"]
    assert main(["measure", *words, f"output={tmp_path / 'second'}"]) == 0
    assert "not causal: queries see later tokens" in capsys.readouterr().out
    assert "not causal: queries see later tokens" in (tmp_path / "second" / "report" / "index.html").read_text()
    run = read_run(tmp_path / "second")
    assert not run.facts["measurement"]["causal"]
    assert run.last("final", "ceiling_nats") == pytest.approx([math.log(32)])
    assert main(["evaluate", *words]) == 1
    assert "LlamaForCausalLM is not causal: later tokens change" in capsys.readouterr().err
    assert main(["measure", *words, "measures=perplexity", f"output={tmp_path / 'third'}"]) == 1
    assert "LlamaForCausalLM is not causal: later tokens change" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["auto", "eager"])
def test_a_model_without_attention_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    config = MambaConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "text.py").write_text(TEXT)
    words = ["measure", str(tmp_path / "m"), f"text={tmp_path / 'text.py'}", "context=16", f"output={tmp_path / 'h'}"]
    assert main([*words, f"method={method}"]) == 1
    assert "mamba has no softmax attention" in capsys.readouterr().err
    assert not (tmp_path / "h").exists()
    assert main(["evaluate", *words[1:4]]) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("vocabulary", "width", "context"), [(65_536, 64, 1024), (512, 1024, 512)])
def test_the_estimate_of_an_evaluation_is_near_its_peak(vocabulary: int, width: int, context: int) -> None:
    """In a process of its own: the peak of a process never falls."""
    script = f"""
import psutil, torch
from transformers import GPT2Config, GPT2LMHeadModel
from normfree.measures.windows import evaluation_estimate
from normfree.measures.measurement import peak_memory_mib
from normfree.measures.perplexity import evaluate_blocks
config = GPT2Config(vocab_size={vocabulary}, n_embd={width}, n_layer=4, n_head=4, n_positions={context})
with torch.device("meta"):
    needed = evaluation_estimate(GPT2LMHeadModel(config), context={context})
held = psutil.Process().memory_info().rss
evaluate_blocks(GPT2LMHeadModel(config), torch.zeros(1, {context}, dtype=torch.long))
print((held + needed) / 2**20 / peak_memory_mib(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1, abs=0.25)
