"""`normfree measure`: any language model in, the folder of a run and a page out."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from normfree.analysis.groups import group_runs
from normfree.cli.main import main
from normfree.store.runs import find_runs, load_runs, read_run
from tests.measures.byte_model import TEXT, byte_gpt2, byte_tokenizer


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder.parent / "text.py").write_text(TEXT)
    return folder


@pytest.fixture
def model() -> GPT2LMHeadModel:
    return byte_gpt2()


@pytest.fixture
def saved(model: GPT2LMHeadModel, tmp_path: Path) -> Path:
    return save(model, tmp_path / "model")


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
    (row,) = load_runs(tmp_path / "measured").to_dict("records")
    assert row["label"] == "model"
    page = (tmp_path / "measured" / "report" / "index.html").read_text()
    assert "<svg" in page
    assert f": {run.facts['measurement']['sequences']} windows of 32 tokens" in page
    assert "://" not in page
    assert "SM is softmax attention" not in page  # names of variants
    for name in ("figures/entropy_nats-heads.png", "tables/layers.csv", "tables/ranges.md", "numbers/heads.csv"):
        assert (tmp_path / "measured" / "report" / name).stat().st_size > 0


@pytest.mark.slow
def test_two_models_are_compared_head_by_head(saved, model, tmp_path, capsys) -> None:
    assert measure(saved) == 0
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[:, 16:32] *= 3  # queries of head 1 of layer 1
    assert measure(save(model, tmp_path / "other"), f"output={tmp_path / 'second'}") == 0
    capsys.readouterr()
    folders = [str(tmp_path / "measured"), str(tmp_path / "second")]
    assert main(["report", *folders, f"output={tmp_path / 'both'}"]) == 0, capsys.readouterr().err
    a, b = (np.array(run.last("final", "entropy_nats")) for run in find_runs(folders))
    assert f"layer 1 head 1: {a[1, 1] - b[1, 1]:.2f}<" in (tmp_path / "both" / "index.html").read_text()
    assert (tmp_path / "both" / "figures" / "entropy_nats-differences.png").stat().st_size > 0


def test_an_output_folder_with_something_else_is_refused(saved, tmp_path, capsys) -> None:
    assert measure(saved) == 0
    assert measure(saved) == 0  # the same again
    before = (tmp_path / "measured" / "run.json").read_bytes()
    assert measure(saved, "context=16") == 1
    assert "holds a measurement with another text, context, sequences; name a new" in capsys.readouterr().err
    assert (tmp_path / "measured" / "run.json").read_bytes() == before
    assert measure(saved, f"output={saved}") == 1
    assert f"output={saved} holds something else" in capsys.readouterr().err


def test_two_models_of_one_folder_name_stay_two(saved: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(saved, tmp_path / "twin" / "model")
    assert measure(saved) == 0
    assert measure(twin, f"text={tmp_path / 'text.py'}", f"output={tmp_path / 'second'}") == 0
    groups = group_runs(find_runs([tmp_path / "measured", tmp_path / "second"]))
    assert [group.name for group in groups] == ["model (measured)", "model (second)"]


@pytest.mark.parametrize(
    ("second", "names"),
    [
        ("other.py", ["model [text=other.py]", "model [text=text.py]"]),
        ("more/text.py", ["model [text=text.py] (first)", "model [text=text.py] (second)"]),
    ],
)
def test_two_texts_of_one_model_have_two_labels(second, names, saved: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / second).parent.mkdir(exist_ok=True)
    (tmp_path / second).write_text(TEXT[::-1])
    for text, output in ((tmp_path / "text.py", "first"), (tmp_path / second, "second")):
        assert measure(saved, f"text={text}", f"output={tmp_path / output}") == 0
    assert main(["report", str(tmp_path / "first"), str(tmp_path / "second"), f"output={tmp_path / 'both'}"]) == 0
    page = (tmp_path / "both" / "index.html").read_text()
    assert all(name in page for name in names)
    assert [group.name for group in group_runs(find_runs([tmp_path / "first", tmp_path / "second"]))] == names


def test_the_page_names_the_bos_token_of_windows(saved, tmp_path, capsys) -> None:
    assert measure(saved, "bos=true") == 1
    assert "the tokenizer has no BOS token" in capsys.readouterr().err
    PreTrainedTokenizerFast.from_pretrained(saved, bos_token="a").save_pretrained(saved)
    assert measure(saved, "bos=true") == 0, capsys.readouterr().err
    assert "each with a first" in (tmp_path / "measured" / "report" / "index.html").read_text()
    assert main(["evaluate", str(saved), f"text={tmp_path / 'text.py'}", "context=32", "bos=true"]) == 0
    assert "every window begins with a)" in capsys.readouterr().out


def test_heads_without_a_finite_row_are_undecided(model, tmp_path, capsys) -> None:
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, :16] = math.nan
    assert measure(save(model, tmp_path / "model")) == 0, capsys.readouterr().err
    run = read_run(tmp_path / "measured")
    assert math.isnan(run.last("final", "entropy_nats")[1][0])
    assert run.last("final", "rows")[1][0] == 0
    assert run.last("final", "nonfinite_rows")[1][0] > 0
    assert "| undecided |" in capsys.readouterr().out


def test_an_unrouted_family_says_how_to_measure_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=2)), tmp_path / "m")
    assert measure(folder) == 1
    assert "method='eager'" in capsys.readouterr().err
    assert measure(folder, "method=eager") == 0, capsys.readouterr().err


def test_heads_that_see_later_tokens_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=64, is_causal=False)
    folder = save(LlamaForCausalLM(config), tmp_path / "both ways")
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


@pytest.mark.parametrize("method", ["auto", "eager"])
def test_a_model_without_attention_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    config = MambaConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, state_size=4)
    folder = save(MambaForCausalLM(config), tmp_path / "m")
    assert measure(folder, f"method={method}") == 1
    assert "mamba has no softmax attention" in capsys.readouterr().err
    assert not (tmp_path / "measured").exists()
    words = ["evaluate", str(folder), f"text={tmp_path / 'text.py'}", "context=16"]
    assert main(words) == 0, capsys.readouterr().err
