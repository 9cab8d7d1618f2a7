import re
import shutil
from pathlib import Path

import pytest

from normfree import compose_run, train
from normfree.store.verify import Finding, verify
from tests.training.runs import DAMAGES, damage

RUN = "runs/single/sm-r-seed0"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A finished run at runs/single/NAME with its own corpus cache beside the runs."""
    root = tmp_path_factory.mktemp("verify")
    spec = compose_run([*tiny, "variant=sm-r"]).spec
    train(spec, runs_dir=root / "runs", cache=root / "cache", progress=False)
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def findings(root: Path) -> dict[str, Finding]:
    return {finding.part: finding for finding in verify(root / RUN, cache=root / "cache")}


def test_a_whole_run_is_sound_and_stays_unchanged(root: Path) -> None:
    def state() -> list[tuple[str, int]]:
        return [(str(path), path.stat().st_mtime_ns) for path in sorted(root.rglob("*"))]

    before, parts = state(), findings(root)
    assert list(parts) == ["run.json", "metrics.jsonl", "checkpoint-6", "checkpoint-4", "model", "corpus"]
    assert {finding.state for finding in parts.values()} == {"sound"}
    assert str(parts["model"]) == "sound   model             every file matches its sha256"
    assert state() == before


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damaged_file_is_found(root: Path, how: str) -> None:
    """Each file of run, checkpoints, model and corpus in turn; only the part it belongs to is damaged."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in (".lock", "run.json")]
    assert len(files) > 25
    for path in files:
        content = path.read_bytes()
        damage(path, how)
        damaged = [finding for finding in findings(root).values() if finding.state == "damaged"]
        part = path.parent.name if path.parent.name in ("model", "checkpoint-4", "checkpoint-6") else path.name
        assert [finding.part for finding in damaged] == ["corpus" if "corpora" in path.parts else part], path
        assert path.name in damaged[0].detail or path.name in ("metrics.jsonl", "manifest.json")
        path.write_bytes(content)
    assert {finding.state for finding in findings(root).values()} == {"sound"}


@pytest.mark.parametrize(
    ("old", "new", "detail"),
    [
        ('"peak_learning_rate": 0.', '"peak_learning_rate": 7.', "spec does not match its fingerprint"),
        ('"final": {', '"not_final": {', "finished but has no result"),
        ('"status"', "status", "not readable as JSON"),
    ],
)
def test_a_damaged_record_is_found(root: Path, old: str, new: str, detail: str) -> None:
    record = root / RUN / "run.json"
    text = record.read_text()
    assert old in text
    record.write_text(text.replace(old, new))
    parts = findings(root)
    assert parts["run.json"].state == "damaged"
    assert detail in parts["run.json"].detail
    record.unlink()
    with pytest.raises(ValueError, match="not a run folder"):
        findings(root)


def test_missing_parts_are_absent_not_damaged(root: Path) -> None:
    record = root / RUN / "run.json"
    shutil.rmtree(root / RUN / "model")
    record.write_text(re.sub(r'("fingerprint": )"[0-9a-f]+"', r'\1"another"', record.read_text(), count=1))
    assert (findings(root)["corpus"].state, findings(root)["model"].state) == ("absent", "absent")
    shutil.rmtree(root / "cache")
    assert findings(root)["corpus"].state == "absent"


def test_a_checkpoint_of_another_run_is_damaged(root: Path) -> None:
    """One that was set aside is absent."""
    checkpoints = root / RUN / "checkpoints"
    (checkpoints / "damaged").mkdir()
    (checkpoints / "checkpoint-4").rename(checkpoints / "damaged" / "checkpoint-4")
    assert findings(root)["checkpoint-4"].state == "absent"
    record = root / RUN / "run.json"
    record.write_text(record.read_text().replace('"seed": 0', '"seed": 7'))
    finding = findings(root)["checkpoint-6"]
    assert (finding.state, finding.detail) == ("damaged", "it belongs to a run with another spec")


def test_a_measurement_of_a_model_is_verified() -> None:
    parts = verify(Path(__file__).parents[2] / "results" / "smollm2" / "t8192")
    assert [(finding.part, finding.state) for finding in parts] == [("run.json", "sound"), ("metrics.jsonl", "sound")]


def test_a_measurement_written_twice_is_found(root: Path) -> None:
    record, metrics = root / RUN / "run.json", root / RUN / "metrics.jsonl"
    record.write_text(record.read_text().replace('"metrics_file"', '"not_recorded"'))
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[-1] + "\n")
    assert "twice" in findings(root)["metrics.jsonl"].detail
