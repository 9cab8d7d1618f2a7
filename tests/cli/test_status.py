"""`normfree status` at the door: who trains, how far, and what is left."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from normfree.cli.main import main
from normfree.files import folder_lock
from tests.synthetic import write_run


def unfinished(folder: Path) -> Path:
    """A run at step 40 of 200, as a process leaves it that is training or was killed."""
    place = write_run(folder, "SM+R").folder
    facts = json.loads((place / "run.json").read_text())
    changed = {"status": "running", "final": None, "steps_done": 30, "sessions": [{"from_step": 20}]}
    (place / "run.json").write_text(json.dumps({key: facts[key] for key in facts if key != "metrics_file"} | changed))
    lines = [("loss", 3.25), ("tokens_per_second", 1000.0)]
    content = [json.dumps({"step": 40, "split": "train", "name": name, "value": value}) for name, value in lines]
    (place / "metrics.jsonl").write_text("\n".join(content) + "\n")
    return place


def test_a_finished_run_shows_its_perplexity(tmp_path: Path, run) -> None:
    written = write_run(tmp_path, "SM+R")
    status, out, err = run("status", str(tmp_path))
    assert (status, err) == (0, "")
    assert out.split() == f"{written.place} finished step 200 of 200 perplexity {written.perplexity:.2f}".split()


def test_a_run_under_way_shows_speed_and_time_left(tmp_path: Path, run) -> None:
    place = unfinished(tmp_path)
    with folder_lock(place):
        out = run("status", str(place))[1]
    assert "running      step     40 of 200  loss 3.250 nats  1,000 tokens/s" in out
    spec = json.loads((place / "run.json").read_text())["spec"]
    tokens_left = 160 * spec["train"]["batch_sequences"] * spec["data"]["context"]
    minutes, seconds = divmod(round(tokens_left / 1000), 60)
    assert f"{minutes} min {seconds:02d} s left" in out
    assert "resumed at step 20" in out


def test_a_killed_run_is_stopped_at_its_last_step(tmp_path: Path, run) -> None:
    out = run("status", str(unfinished(tmp_path)))[1]
    assert "stopped      step     40 of 200" in out
    assert "left" not in out
    assert "the same command resumes it" in out


def test_a_folder_held_without_a_record_is_preparing_its_text(tmp_path: Path, run) -> None:
    with folder_lock(tmp_path / "runs" / "quick"):
        status, out, err = run("status", str(tmp_path / "runs"))
        assert (status, out, err) == (0, f"{tmp_path / 'runs' / 'quick'}  preparing the text\n", "")
        place = unfinished(tmp_path / "runs" / "quick")
        assert run("status", str(tmp_path / "runs"))[1].splitlines()[1].startswith(f"quick/{place.name}  stopped")
    assert "preparing" not in run("status", str(tmp_path / "runs"))[1]


@pytest.mark.parametrize("verb", ["study", "train"])
def test_status_says_preparing_while_a_text_is_prepared(verb, tiny, cache, tmp_path, run, monkeypatch, capsys) -> None:
    study = tmp_path / "small.yaml"
    study.write_text("preset: cpu-quick\ngroups:\n  - {variants: [sm], seeds: [0]}\n")
    words = ["study", str(study)] if verb == "study" else ["train", "variant=sm", "study=small"]
    words += [*(word for word in tiny if verb == "train" or not word.startswith("preset=")), f"runs_dir={tmp_path}"]
    lines = []

    def watch(*_: object, **__: object) -> None:
        main(["status", str(tmp_path / "small")])
        lines.extend(capsys.readouterr().out.splitlines())
        raise ValueError("no text")

    module = import_module(f"normfree.training.{'jobs' if verb == 'study' else 'train'}")
    monkeypatch.setattr(module, "prepare", watch)
    assert run(*words, f"cache_dir={cache}")[0] == 1
    place = tmp_path / "small" if verb == "study" else tmp_path / "small" / "sm-seed0"
    assert lines == [f"{place}  preparing the text"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["."], "holds no run"),
        (["a", "watch=yes please"], "watch='yes please'"),
    ],
)
def test_a_folder_without_runs_is_named(words, message, tmp_path, monkeypatch, run) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run("status", *words)
    assert status != 0
    assert message in err
    assert len(err.splitlines()) == 1
