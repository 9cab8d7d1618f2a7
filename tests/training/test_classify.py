"""Runs that fine-tune a head for classes on the body of another run."""

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from normfree import Run, compose_run, measure, read_run
from normfree.data import prepare
from normfree.files import write_atomically
from normfree.model.classification import Classifier
from normfree.spec.run import RunSpec
from normfree.spec.study import load_study
from normfree.spec.variants import MAIN
from normfree.store.tasks import read_tasks
from normfree.tasks.functions import functions_of
from normfree.tasks.labels import CLASSES
from normfree.training.corpora import LabelledCorpus
from tests.elsewhere import WITHOUT_NORMFREE
from tests.small_model import small_model
from tests.training.runs import check_equal_runs, killed_in_step, losses, weights

ELSEWHERE = f"""{WITHOUT_NORMFREE}
import torch, transformers

results = []
for folder, auto, texts in json.load(sys.stdin):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    padded, short = torch.tensor([[5, 6, 7], [5, 6, model.config.pad_token_id]]), torch.tensor([[5, 6]])
    results.append({{
        "classes": [model(torch.tensor([ids])).logits[0].argmax(-1).tolist() for ids in texts],
        "labels": list(model.config.id2label.values()),
        "padded": model(padded).logits[1].tolist(),
        "short": model(short).logits[0].tolist(),
    }})
print(json.dumps(results))
"""
EPOCHS = ("train.steps=null", "train.epochs=1.5")
LONG = ("data.context=128", "data.vocab_size=600", "train.evaluation_sequences=8")
AUTO = {"syntax_error": "AutoModelForSequenceClassification", "token_type": "AutoModelForTokenClassification"}


@pytest.fixture
def code(tmp_path: Path) -> str:
    """Three held-out files of short functions."""
    folder = tmp_path / "code"
    folder.mkdir()
    functions = functions_of(inspect.getsource(module) for module in (inspect, shutil, subprocess))
    short = [function.text for function in functions if len(function.text) < 250]
    for number in range(3):
        (folder / f"{number}.py").write_text("\n\n".join(short[number:120:3]))
    return f"data.validation_paths=['{folder}']"


@pytest.fixture
def tune(train_tiny: Callable[..., Run], code: str) -> Callable[..., Run]:
    """`tune(*overrides)`: fine-tune a run of these held-out files, which is trained first."""
    start = train_tiny(code, *LONG, "train.steps=2")

    def run(*words: str, **more: Any) -> Run:
        task = () if any(word.startswith("train.objective") for word in words) else ("train.objective=token_type",)
        return train_tiny(f"start=run:{start.folder}", code, *LONG, "tag=tuned", *EPOCHS, *task, *words, **more)

    return run


@pytest.mark.slow
def test_saved_models_have_the_recorded_accuracy(tune: Callable[..., Run], cache: Path) -> None:
    runs = {task: tune(f"train.objective={task}", f"tag={task}") for task in AUTO}
    tests = {}
    for task, run in runs.items():
        spec = RunSpec.from_dict(run.spec)
        corpus = prepare(spec.data, cache=cache)
        tests[task] = LabelledCorpus(corpus.folder, corpus.manifest, spec).texts[1]
    jobs = [(f"{runs[task].folder}/model", AUTO[task], [text.input_ids for text in tests[task]]) for task in AUTO]
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for task, loaded in zip(AUTO, json.loads(done.stdout), strict=True):
        by_text = task == "syntax_error"
        right = [
            [classes == text.labels[-1]] if by_text else np.equal(classes, text.labels)[1:]
            for classes, text in zip(loaded["classes"], tests[task], strict=True)
        ]
        record, accuracy = read_tasks(runs[task].folder)[task], runs[task].facts["final"]["accuracy"]
        assert np.concatenate(right).mean() == pytest.approx(accuracy, abs=1e-9)
        assert sum(record["values"]["model"]) / sum(record["sizes"]) == accuracy
        assert loaded["labels"] == list(CLASSES[task])
        padded = loaded["padded"] if by_text else loaded["padded"][:2]
        np.testing.assert_allclose(padded, loaded["short"], atol=1e-5)


def test_a_frozen_body_is_a_linear_probe(tune: Callable[..., Run]) -> None:
    run = tune("train.frozen=['model.*']", "train.epochs=15", "train.peak_learning_rate=2e-2")
    start = AutoModelForCausalLM.from_pretrained(run.spec["start"].removeprefix("run:") + "/model").state_dict()
    saved = weights(run.folder)
    assert all(torch.equal(saved[name], start[name]) for name in saved if name.startswith("model."))
    assert run.perplexity == pytest.approx(read_run(run.spec["start"].removeprefix("run:")).perplexity, rel=1e-6)
    assert np.mean(losses(run)[-5:]) < 0.9 * losses(run)[0]


def test_a_kill_in_fine_tuning_resumes_to_the_bit(tune: Callable[..., Run]) -> None:
    whole = tune()
    with killed_in_step(5):
        tune(runs="killed")
    killed = tune(runs="killed")
    assert killed.facts["resumed"] == 1
    check_equal_runs(killed.folder, whole.folder)
    assert read_tasks(killed.folder) == read_tasks(whole.folder)


def test_a_classifier_is_measured_in_the_precision_of_its_run() -> None:
    plain, classifier = small_model(norm="none"), Classifier(small_model(norm="none").config)
    classifier.load_state_dict(plain.state_dict(), strict=False)
    for model in (plain, classifier):  # as Accelerate wraps them
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    ids_BT = torch.arange(40).view(2, 20)
    expected, entropies = (measure(model, ids_BT, "heads")["entropy_nats"] for model in (plain, classifier))
    np.testing.assert_array_equal(entropies, expected)


def test_micro_batches_do_not_change_the_loss(tune: Callable[..., Run]) -> None:
    runs = [tune(f"train.micro_batch_sequences={size}", f"tag=m{size}") for size in (8, 2)]
    np.testing.assert_allclose(*map(losses, runs), rtol=2e-4)


def test_classifiers_that_cannot_be_are_refused(tune: Callable[..., Run]) -> None:
    run = tune("train.epochs=0.2")
    with pytest.raises(ValueError, match="a classifier has no head for tokens; give the run that it began with"):
        compose_run([f"start=run:{run.folder}"])


def test_the_shipped_study_starts_each_variant_from_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variant in MAIN[:4]:
        facts = {"status": "finished", "spec": compose_run(["preset=cpu-quick", f"variant={variant}"]).spec.to_dict()}
        folder = tmp_path / "runs" / "quick" / f"{variant}-seed0"
        facts["spec"]["study"] = "quick"
        write_atomically(folder / "run.json", json.dumps(facts))
        write_atomically(folder / "model" / "config.json", "{}")
        write_atomically(folder / "model" / "model.safetensors", variant)
    specs = [job.spec for job in load_study("fine-tune").jobs()]
    assert len({spec.name for spec in specs}) == len(specs) == 12
    assert all(spec.start_name == f"quick/{spec.variant}" for spec in specs)
    assert len({spec.start_sha256 for spec in specs}) == 4
    assert all(len({s.recipe() for s in specs if s.tag == tag}) == 1 for tag in ("syntax", "types-probe"))
