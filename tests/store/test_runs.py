import json
import math
from pathlib import Path

import pytest

from normfree.spec.run import RunSpec
from normfree.store.runs import DamagedRunError, RunWriter, find_runs, load_runs, read_lines, read_run
from tests.synthetic import write_run


def begin(folder: Path, **facts: object) -> RunWriter:
    spec = RunSpec.from_dict({"preset": "cpu", "variant": "sm-r", "label": "SM+R", "train": {"steps": 2}})
    folder.mkdir(parents=True, exist_ok=True)
    corpus = {"fingerprint": "f", "unigram_perplexity": 400.0, "vocab_size": 300}
    return RunWriter(folder, {"spec": spec.to_dict(), "corpus": corpus, "steps": 2, **facts})


def test_logged_values_are_read_back_with_nan(tmp_path: Path) -> None:
    """And every line is JSON for any reader."""
    writer = begin(tmp_path)
    writer.log(1, "probe", [("entropy_nats", [[1.5, math.nan]]), ("loss", math.inf)])
    run = read_run(tmp_path)
    assert run.last("probe", "entropy_nats")[0][0] == 1.5
    assert math.isnan(run.last("probe", "entropy_nats")[0][1])
    assert run.series("probe", "loss") == [(1, math.inf)]
    assert run.last("probe", "never logged") is None

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_torn_last_line_is_ignored_but_damage_is_not(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    writer.log(1, "train", [("loss", 2.0)])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    assert [line["value"] for line in read_lines(path)] == [2.0]
    path.write_text(whole[:20] + "\n" + whole)
    with pytest.raises(ValueError, match="line 1"):
        list(read_lines(path))


def test_a_resumed_run_holds_each_step_once(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    for step in (1, 2, 3):
        writer.log(step, "train", [("loss", float(step))])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')
    writer.forget_after(2)
    writer.log(3, "train", [("loss", 30.0)])
    assert read_run(tmp_path).series("train", "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_only_a_finished_run_has_a_perplexity(tmp_path: Path) -> None:
    writer = begin(tmp_path / "a")
    writer.update(status="diverged", divergence={"step": 1}, final={"perplexity": 3.0})
    assert math.isnan(read_run(tmp_path / "a").perplexity)
    writer.update(status="finished")
    assert load_runs(tmp_path)["perplexity"].tolist() == [3.0]


def test_folders_without_readable_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="holds no run"):
        find_runs([tmp_path])
    for content, message in (('{"format": 99}', "format 99"), ("{", "not readable as JSON"), ("[]", "has no format")):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            find_runs([tmp_path])


def test_changed_metrics_of_a_finished_run_are_refused(tmp_path: Path) -> None:
    """A truncated copy would look like a run that nobody measured."""
    writer = begin(tmp_path)
    writer.log(1, "train", [("loss", 1.0), ("learning_rate", 0.1)])
    writer.update(status="finished")
    assert read_run(tmp_path).last("train", "loss") == 1.0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    with pytest.raises(DamagedRunError, match=r"does not match the sha256 in run\.json"):
        _ = read_run(tmp_path).metrics
    metrics.unlink()
    with pytest.raises(DamagedRunError, match=r"does not match the sha256 in run\.json"):
        _ = read_run(tmp_path).metrics


def test_a_table_of_runs_has_their_settings(tmp_path: Path) -> None:
    write_run(tmp_path, "SM+R", seed=2, tag="high", data_seed=1, train={"peak_learning_rate": 0.1})
    write_run(tmp_path, "SM+G", status="diverged")
    rows = load_runs(tmp_path, all_columns=True).set_index("label")
    names = ["tag", "seed", "data_seed", "norm", "activation", "peak_learning_rate"]
    assert rows.loc["SM+R (high)", names].tolist() == ["high", 2, 1, "none", "relu", 0.1]
    assert rows.loc["SM+G", "diverged_at"] == 100
    assert rows.loc["SM+R (high)", "train.peak_learning_rate"] == 0.1
    assert rows.loc["SM+R (high)", "data.context"] > 1


def test_a_table_shows_only_what_tells_runs_apart(tmp_path: Path) -> None:
    write_run(tmp_path, "SM+R", train={"peak_learning_rate": 0.1})
    other = write_run(tmp_path, "SM+G")
    names = ["folder", "label", "seed", "activation", "peak_learning_rate", "status", "perplexity", "bits_per_byte"]
    assert list(load_runs(tmp_path)) == names
    assert list(load_runs(other.folder)) == ["folder", "label", "seed", "status", "perplexity"]


def test_a_run_prints_as_one_line(tmp_path: Path) -> None:
    finished, stopped = write_run(tmp_path, "SM+R"), write_run(tmp_path, "SM+G", status="interrupted")
    assert repr(finished) == f"Run {finished.folder}: SM+R, seed 0, finished, perplexity 36.10"
    assert repr(stopped) == f"Run {stopped.folder}: SM+G, seed 0, interrupted, step 100"
    measured = write_run(tmp_path, "SM+LN+G", facts={"kind": "measurement"})
    assert repr(measured) == f"Run {measured.folder}: a measurement of SM+LN+G"


def test_a_run_named_twice_is_found_once(tmp_path: Path) -> None:
    begin(tmp_path / "study" / "run")
    assert len(find_runs([tmp_path, tmp_path / "study", tmp_path / "study" / "run"])) == 1
