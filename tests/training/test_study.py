"""A study: many runs, one report; what is done stays done."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from normfree.files import folder_lock
from normfree.store.runs import find_runs
from normfree.training.environment import command_line
from normfree.training.launch import Launch
from normfree.training.study import run_study
from normfree.training.workers import run_side_by_side

FILE = """\
mix: true
note: A note on weight.
preset: cpu-quick
groups:
  - variants: [sm-r, sm]
    seeds: [0]
  - variants: [sm-r]
    seeds: [0]
    tag: wild
    set: {train.peak_learning_rate: 1.0e30, train.warmup_share: 0.0}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny: list[str], cache: Path) -> tuple[Path, list[str], Path]:
    """(study file, overrides, page) of a study of three runs, one of which diverges."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "small.yaml").write_text(FILE)
    shrunk = [text for text in tiny if not text.startswith(("preset=", "train.peak_learning_rate="))]
    overrides = [*shrunk, f"runs_dir={folder / 'runs'}", f"cache_dir={cache}"]
    return folder / "small.yaml", overrides, run_study(str(folder / "small.yaml"), overrides)


def test_a_diverging_run_does_not_stop_the_others(
    done: tuple[Path, list[str], Path],
) -> None:
    runs = {run.name: run.status for run in find_runs([done[2].parents[1]])}
    assert runs == {"sm-r-seed0": "finished", "sm-seed0": "finished", "sm-r-wild-seed0": "diverged"}


def test_the_page_carries_the_note(done: tuple[Path, list[str], Path]) -> None:
    page = done[2].read_text()
    assert done[2].name == "index.html"
    assert "A note on weight." in page


def test_a_second_time_nothing_is_trained_again(done: tuple[Path, list[str], Path]) -> None:
    study, overrides, page = done
    files = [path for path in page.parents[1].rglob("*") if path.name in ("run.json", "metrics.jsonl")]
    before = {path: path.stat().st_mtime_ns for path in files}
    content = page.read_bytes()
    assert run_study(str(study), overrides) == page
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert page.read_bytes() == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groups: []", "not a study: preset is missing"),
        ("preset: cpu\ngroups: []", "not a study: groups=.*at least 1 item"),
        ("preset: cpu\ngroups: [{variants: []}]", "not a study: groups.variants=.*at least 1 item"),
        ("preset: caf\u00e9", r"s.yaml is not a study: 'utf-8' codec"),
        ("preset: cpu\ngroups: [{variants: [sm], tags: x}]", "unknown key 'groups.tags'; did you mean groups.tag"),
        (
            "preset: cpu\ngroups: [{variants: [sm]}, {variants: [sm]}]",
            "more than one run would be .*/s/sm-seed0: give each group its own tag",
        ),
        ("preset: cpu\ngroups: [{variants: [smm]}]", "did you mean sm"),
        ("[1, 2", "not a study"),
        ("", "not a study: preset is missing"),
        (FILE.replace("mix: true\n", ""), "add mix: true"),
        (
            "preset: cpu\nset: {data: files, data.paths: [a]}\ngroups:\n  - variants: [sm]\n"
            "  - {variants: [sm-r], set: {data.paths: [b]}}",
            "add mix: true",
        ),
    ],
)
def test_a_wrong_study_file_is_refused_before_anything_runs(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        run_study(str(tmp_path / "s.yaml"), [f"runs_dir={tmp_path / 'runs'}"])
    assert not (tmp_path / "runs").exists()


def one_run(folder: Path, overrides: list[str]) -> tuple[str, list[str]]:
    """(study file, overrides) of a study of one run, in `folder`."""
    (folder / "alike.yaml").write_text("preset: cpu-quick\ngroups:\n  - {variants: [sm]}\n")
    return str(folder / "alike.yaml"), [*overrides, f"runs_dir={folder}"]


def test_earlier_results_of_another_recipe_or_corpus_are_refused(
    done: tuple[Path, list[str], Path], tmp_path: Path
) -> None:
    file, words = one_run(tmp_path, done[1])
    run_study(file, words)
    more = ["tag=long", "train.steps=7"]
    with pytest.raises(ValueError, match=r"sm-seed0 has another recipe.*give study=NAME"):
        run_study(file, [*words, *more])
    record = tmp_path / "alike" / "sm-seed0" / "run.json"
    record.write_text(re.sub(r'("fingerprint": )"[0-9a-f]+"', r'\1"another"', record.read_text(), count=1))
    with pytest.raises(ValueError, match="sm-seed0 has another corpus"):
        run_study(file, words)
    assert [run.name for run in find_runs([tmp_path / "alike"])] == ["sm-seed0"]
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "failed"'))
    assert run_study(file, [*words, *more]).is_file()  # what has no result stands in nobody's way


@pytest.mark.slow
def test_a_damaged_record_of_the_study_is_trained_again(done: tuple[Path, list[str], Path], tmp_path: Path) -> None:
    file, words = one_run(tmp_path, done[1])
    run_study(file, words)
    record = tmp_path / "alike" / "sm-seed0" / "run.json"
    record.write_text(record.read_text()[:100])
    run_study(file, words)
    assert [run.status for run in find_runs([tmp_path / "alike"])] == ["finished"]


def test_another_damaged_record_is_named_before_training(done: tuple[Path, list[str], Path], tmp_path: Path) -> None:
    file, words = one_run(tmp_path, done[1])
    record = tmp_path / "alike" / "older-seed0" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    with pytest.raises(ValueError, match=r"older-seed0/run\.json is not readable as JSON"):
        run_study(file, words)
    assert not (tmp_path / "alike" / "sm-seed0").exists()


def test_a_report_that_cannot_be_made_hides_no_failure(
    done: tuple[Path, list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, words = one_run(tmp_path, done[1])
    other = tmp_path / "alike" / "older-seed0"

    def fail_and_damage(*_: object, **__: object) -> Path:
        other.mkdir(parents=True)
        (other / "run.json").write_text("{")
        raise RuntimeError("no more memory")

    monkeypatch.setattr("normfree.training.launch.train", fail_and_damage)
    message = (
        r"no report: .*older-seed0.*not readable as JSON.* 1 of 1 runs failed: sm-seed0 \(RuntimeError: no more memory"
    )
    with pytest.raises(RuntimeError, match=message):
        run_study(file, words)


def test_workers_take_threads_for_all_runs_or_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixed.yaml").write_text(
        "preset: cpu-quick\ngroups:\n"
        "  - {variants: [sm-r], seeds: [0], set: {train.threads: 1}}\n"
        "  - {variants: [sm-g], seeds: [0]}\n"
    )
    monkeypatch.setattr("normfree.training.launch.usable_cores", lambda: 2)
    with pytest.raises(ValueError, match=r"workers=2: set train\.threads for all runs or for none"):
        run_study(str(tmp_path / "mixed.yaml"), [f"runs_dir={tmp_path}"], Launch(workers=2))


def test_a_study_of_which_no_run_can_begin_says_why(done: tuple[Path, list[str], Path], tmp_path: Path) -> None:
    words = [*done[1], f"runs_dir={tmp_path}", "train.precision=fp16"]
    with pytest.raises(RuntimeError, match=r"3 of 3 runs failed: .*fp16 needs a GPU.*; there is nothing to report"):
        run_study(str(done[0]), words)


def test_a_run_that_another_process_trains_is_left_to_it(
    done: tuple[Path, list[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study, overrides, _ = done
    elsewhere = tmp_path / "runs"
    with folder_lock(elsewhere / "small" / "sm-r-seed0"), caplog.at_level("INFO", logger="normfree"):
        page = run_study(str(study), [*overrides, f"runs_dir={elsewhere}"])
    assert "another process is training sm-r-seed0; skipped here" in caplog.text
    assert {run.name for run in find_runs([page.parents[1]])} == {"sm-seed0", "sm-r-wild-seed0"}


def test_a_failing_run_is_named_after_the_others(
    done: tuple[Path, list[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "half.yaml"
    file.write_text(
        "mix: true\npreset: cpu-quick\ngroups:\n"
        "  - {variants: [sm-r], tag: bad, set: {model.vocab_size: 10}}\n"
        "  - {variants: [sm]}\n"
    )
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed: sm-r-bad-seed0 \(ValueError: model.vocab_size=10"):
        run_study(str(file), [*done[1], f"runs_dir={tmp_path}"])
    assert {run.name: run.status for run in find_runs([tmp_path / "half"])} == {"sm-seed0": "finished"}
    assert (tmp_path / "half" / "report" / "index.html").exists()
    assert "Traceback" not in caplog.text


@pytest.mark.slow
def test_a_run_that_failed_in_a_worker_waits(
    done: tuple[Path, list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, words = one_run(tmp_path, done[1])
    tried: list[str] = []

    def fail(*rest: object, **named: object) -> None:
        tried.append("once")
        raise RuntimeError("no more air")

    def work(command: list[str], *, count: int, environment: dict[str, str], standard_input: str) -> list[int]:
        with pytest.raises(RuntimeError, match="no more air"):
            run_study(file, words)
        return [1] * count

    monkeypatch.setattr("normfree.training.callbacks.measure_batches", fail)
    monkeypatch.setattr("normfree.training.launch.usable_cores", lambda: 2)
    monkeypatch.setattr("normfree.training.launch.run_side_by_side", work)
    with pytest.raises(RuntimeError, match=r"1 of 1 runs failed: sm-seed0 \(RuntimeError: no more air\)"):
        run_study(file, words, Launch(workers=2))
    assert tried == ["once"]
    monkeypatch.undo()
    time.sleep(1.1)  # sessions are told by the second
    assert run_study(file, words).is_file()


@pytest.mark.slow
def test_two_workers_share_the_runs_and_get_the_same_numbers(
    done: tuple[Path, list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, overrides, page = done
    monkeypatch.setattr("normfree.training.launch.usable_cores", lambda: 2)
    statuses: list[int] = []

    def started(command: list[str], *, count: int, environment: dict[str, str], standard_input: str) -> list[int]:
        statuses.extend(run_side_by_side(command, count=count, environment=environment, standard_input=standard_input))
        return statuses

    def train_here(*_: object, **__: object) -> None:
        pytest.fail("the workers left a run to this process")

    monkeypatch.setattr("normfree.training.launch.run_side_by_side", started)
    monkeypatch.setattr("normfree.training.trainer.NormFreeTrainer.train", train_here)
    shared = run_study(str(study), [*overrides, f"runs_dir={tmp_path}"], Launch(workers=2))
    assert statuses == [0, 0]
    alone, together = find_runs([page.parents[1]]), find_runs([shared.parents[1]])
    assert [run.status for run in together] == [run.status for run in alone]
    assert [run.facts["final"] for run in together] == [run.facts["final"] for run in alone]
    assert {run.facts["command"] for run in together} == {command_line()}


def test_runs_left_by_workers_are_trained_here(
    done: tuple[Path, list[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    study, overrides, _ = done
    words = [word for word in overrides if not word.startswith("train.threads=")]
    threads: list[tuple[int, str]] = []

    def die(command: list[str], *, count: int, environment: dict[str, str], standard_input: str) -> list[int]:
        (job, *_) = json.loads(standard_input)["jobs"]
        threads.append((job["spec"]["train"]["threads"], environment["OMP_NUM_THREADS"]))
        return [9] * count

    monkeypatch.setattr("normfree.training.launch.usable_cores", lambda: 2)
    monkeypatch.setattr("normfree.training.launch.run_side_by_side", die)
    with caplog.at_level("WARNING", logger="normfree"):
        page = run_study(str(study), [*words, f"runs_dir={tmp_path}"], Launch(workers=2))
    assert caplog.text.count("ended with status 9") == 2
    assert threads == [(1, "1")]
    assert {run.facts["environment"]["threads"] for run in find_runs([page.parents[1]])} == {1}


@pytest.mark.parametrize("workers", [0, 10_000])
def test_more_workers_than_cores_are_refused(workers: int) -> None:
    with pytest.raises(ValueError, match=f"workers={workers}: this machine has"):
        run_study("quick", launch=Launch(workers=workers))
