"""Every saved model has a model card, can be read by others, and can be pushed to the hub."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM

from normfree.files import read_manifest
from normfree.pretrained.inputs import read_images
from normfree.store.runs import read_run
from normfree.training.card import model_card
from tests.synthetic import write_run


def test_the_card_holds_the_results_of_the_run(trained: Path) -> None:
    run, card = read_run(trained), ModelCard.load(trained / "model" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag.endswith("generation")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"perplexity": run.perplexity, "bits_per_byte": run.facts["final"]["bits_per_byte"]}
    assert f"| Perplexity | {run.perplexity:.3f} |" in card.text
    assert f"{run.facts['model']['parameters']:,} parameters" in card.text
    assert f"{run.tokens_seen:,} tokens," in card.text
    assert "README.md" in read_manifest(trained / "model")["files"]
    for folder in (trained / "model", *trained.glob("checkpoints/checkpoint-*")):
        assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"], indirect=True)
def test_the_code_of_the_card_loads_the_model(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained / "model")
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].num_parameters() == read_run(trained).facts["model"]["parameters"]
    assert names["tokenizer"]("import json")["input_ids"]


@pytest.mark.parametrize("family", ["vision"], indirect=True)
def test_a_classifier_of_images_can_be_used_and_measured(trained: Path, tmp_path: Path, cache: Path, run) -> None:
    record, card = read_run(trained), ModelCard.load(trained / "model" / "README.md")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace('"."', repr(str(trained / "model"))), names)
    folder = Path(record.spec["data"]["validation_paths"][0])
    images = read_images(folder, names["processor"], 40, channels=1)
    guesses = [names["model"].config.id2label[guess] for guess in names["model"](**images).logits.argmax(-1).tolist()]
    right = [path.parent.name == guess for path, guess in zip(sorted(folder.rglob("*.png")), guesses, strict=True)]
    assert record.score == pytest.approx(100 * sum(right) / 40)
    assert card.data.eval_results[0].metric_value == record.score / 100
    assert run("measure", str(trained), f"cache_dir={cache}", f"output={tmp_path / 'own'}")[0] == 0
    entropies = (read_run(place).last("final", "entropy_nats") for place in (tmp_path / "own", trained))
    np.testing.assert_allclose(*entropies, atol=1e-5)
    assert f"accuracy       {record.score:.2f} %" in run("evaluate", str(trained), f"cache_dir={cache}")[1]


def test_a_card_describes_the_model_that_was_saved() -> None:
    results = Path(__file__).parents[2] / "results"
    tuned, cut = (read_run(results / name) for name in ("fine-tune/sm-r-syntax-seed0", "removal/sm-fake-g-seed0"))
    card = ModelCard(model_card(tuned, tuned.facts["final"]))
    assert [(each.task_type, each.metric_type) for each in card.data.eval_results] == [
        ("text-classification", "accuracy")
    ]
    assert "Perplexity" not in card.text
    assert "norm `none`" in model_card(cut, cut.facts["final"])


def test_a_run_without_finite_perplexity_has_a_card(tmp_path: Path) -> None:
    run = write_run(tmp_path, "SM")
    text = model_card(run, run.facts["final"] | {"perplexity": float("nan")})
    assert ModelCard(text).data.model_name == run.place
    assert "| Perplexity | nan |" in text


def test_a_model_is_pushed_with_its_code(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the upload. transformers keeps the card of the repository, else it writes one of its own."""
    uploaded: dict[str, bytes] = {}

    def commit(_api: HfApi, **facts: Any) -> str:
        for operation in facts["operations"]:
            with operation.as_file() as file:
                uploaded[operation.path_in_repo] = file.read()
        return "done"

    monkeypatch.setattr(HfApi, "create_repo", Mock(return_value=SimpleNamespace(repo_id="somebody/sm-r")))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(ModelCard, "load", Mock(side_effect=EntryNotFoundError("offline")))
    AutoModelForCausalLM.from_pretrained(trained / "model").push_to_hub("somebody/sm-r")
    saved = {file.name for file in (trained / "model").iterdir()}
    code = {name for name in saved if name.endswith(".py")}
    assert code | {"config.json", "model.safetensors", "README.md"} <= uploaded.keys() <= saved
    assert uploaded["model.safetensors"] == (trained / "model" / "model.safetensors").read_bytes()
