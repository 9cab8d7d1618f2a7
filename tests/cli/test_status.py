"""`normfree status` at the door: who trains, how far, and what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
