"""A study: many runs, one report; what is done stays done."""

import re
from pathlib import Path

import pytest

from normfree.files import folder_lock
from normfree.store.runs import find_runs
from normfree.training.study import run_study

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


def test_a_diverging_run_does_not_stop_the_others(done: tuple[Path, list[str], Path]) -> None:
    runs = {run.name: run.status for run in find_runs([done[2].parents[1]])}
    assert runs == {"sm-r-seed0": "finished", "sm-seed0": "finished", "sm-r-wild-seed0": "diverged"}
    assert "A note on weight." in done[2].read_text()


def test_a_second_time_nothing_is_trained_again(done: tuple[Path, list[str], Path], caplog) -> None:
    study, overrides, page = done
    files = [path for path in page.parents[1].rglob("*") if path.name in ("run.json", "metrics.jsonl")]
    before = {path: path.stat().st_mtime_ns for path in files}
    content = page.read_bytes()
    with caplog.at_level("INFO", logger="normfree"):
        assert run_study(str(study), overrides) == page
    assert "small: 3 runs, 0.0 M tokens, " in caplog.messages[0]
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert page.read_bytes() == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: cpu\ngroups: [{variants: []}]", "not a study: groups.variants=.*at least 1 item"),
        ("preset: caf\u00e9", r"s.yaml is not a study: 'utf-8' codec"),
        ("preset: cpu\ngroups: [{variants: [sm], data_seed: other}]", "groups.data_seed.*='other': it should be"),
        ("preset: cpu\ngroups: [{variants: [sm], tags: x}]", "unknown key 'groups.tags'; did you mean groups.tag"),
        (
            "preset: cpu\ngroups: [{variants: [sm]}, {variants: [sm]}]",
            "more than one run would be .*/s/sm-seed0: give each group its own tag",
        ),
        ("preset: cpu\ngroups: [{variants: [smm]}]", "did you mean sm"),
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


def test_earlier_results_of_another_recipe_or_corpus_are_refused(done, tmp_path) -> None:
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


def test_another_damaged_record_is_named_before_training(done: tuple[Path, list[str], Path], tmp_path: Path) -> None:
    file, words = one_run(tmp_path, done[1])
    record = tmp_path / "alike" / "older-seed0" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    with pytest.raises(ValueError, match=r"older-seed0/run\.json is not readable as JSON"):
        run_study(file, words)
    assert not (tmp_path / "alike" / "sm-seed0").exists()


def test_a_report_that_cannot_be_made_hides_no_failure(done, tmp_path, monkeypatch) -> None:
    file, words = one_run(tmp_path, done[1])
    other = tmp_path / "alike" / "older-seed0"

    def fail_and_damage(*_: object, **__: object) -> Path:
        other.mkdir(parents=True)
        (other / "run.json").write_text("{")
        raise RuntimeError("no more memory")

    monkeypatch.setattr("normfree.training.jobs.train", fail_and_damage)
    message = (
        r"no report: .*older-seed0.*not readable as JSON.* 1 of 1 runs failed: sm-seed0 \(RuntimeError: no more memory"
    )
    with pytest.raises(RuntimeError, match=message):
        run_study(file, words)


def test_a_study_of_which_no_run_can_begin_says_why(done: tuple[Path, list[str], Path], tmp_path: Path) -> None:
    words = [*done[1], f"runs_dir={tmp_path}", "train.precision=fp16"]
    with pytest.raises(RuntimeError, match=r"3 of 3 runs failed: .*fp16 needs a GPU.*; there is nothing to report"):
        run_study(str(done[0]), words)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_missing_text_stops_a_study_once(workers, done, tmp_path, run, caplog) -> None:
    words = [*done[1], f"runs_dir={tmp_path / 'runs'}", "data.paths=[nowhere]", "train.steps=1", f"workers={workers}"]
    status, out, err = run("study", str(done[0]), *words)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("normfree: data.paths: 'nowhere' matches no file; allowed are")
    assert "failed" not in caplog.text + err
    assert not list((tmp_path / "runs").rglob("run.json"))


def test_a_run_that_another_process_trains_is_left_to_it(done, tmp_path, caplog) -> None:
    study, overrides, _ = done
    elsewhere = tmp_path / "runs"
    with folder_lock(elsewhere / "small" / "sm-r-seed0"), caplog.at_level("INFO", logger="normfree"):
        page = run_study(str(study), [*overrides, f"runs_dir={elsewhere}"])
    assert "another process is training sm-r-seed0; skipped here" in caplog.text
    assert {run.name for run in find_runs([page.parents[1]])} == {"sm-seed0", "sm-r-wild-seed0"}


def test_a_failing_run_is_named_after_the_others(done, tmp_path, caplog) -> None:
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
