"""Check a run folder byte by byte: its records, checkpoints, saved model, and the corpus behind them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from normfree.data.corpus import SOURCES, corpus_key, default_cache, prepared
from normfree.files import MANIFEST_NAME, damages, describe_files, fingerprint, read_manifest
from normfree.spec.run import RunSpec
from normfree.store.checkpoints import SET_ASIDE, belongs_to, checkpoints_in
from normfree.store.runs import METRICS_FILE, RUN_FILE, DamagedRunError, Run, read_lines, read_run

State = Literal["sound", "damaged", "absent"]


@dataclass(frozen=True)
class Finding:
    """What was found about one part of a run folder."""

    part: str
    """run.json, metrics.jsonl, checkpoint-100, model or corpus."""
    state: State
    """absent is no damage: the part was never written, or lies on another machine."""
    detail: str

    def __str__(self) -> str:
        return f"{self.state:<8}{self.part:<18}{self.detail}"


def verify(folder: Path | str, *, cache: Path | None = None) -> list[Finding]:
    """Check every file of a run folder that has a recorded hash; `cache` is where corpora lie.

    Nothing is changed. Raises ValueError when `folder` is no run folder or has another format.
    """
    folder = Path(folder)
    try:
        run = read_run(folder)
    except DamagedRunError as error:
        return [Finding(RUN_FILE, "damaged", str(error)), *_checkpoints(folder, None)]
    try:
        spec = RunSpec.from_dict(run.spec)
    except ValueError as error:
        return [Finding(RUN_FILE, "damaged", f"its spec is refused: {error}"), *_checkpoints(folder, None)]
    problems = []
    if run.facts.get("spec_fingerprint") not in (None, fingerprint(run.spec)):  # records of before have none
        problems.append("its spec is not the one whose fingerprint it has")
    if run.status == "finished" and not run.facts.get("final"):
        problems.append("it is finished and has no result")
    told = f"{run.label}, seed {run.seed}: {run.status}, {run.facts['steps_done']} steps"
    return [
        _finding(RUN_FILE, problems, told),
        _metrics(run),
        *_checkpoints(folder, spec),
        _model(run),
        _corpus(run, spec, cache or default_cache()),
    ]


def _metrics(run: Run) -> Finding:
    path = run.folder / METRICS_FILE
    if not path.is_file():
        return Finding(METRICS_FILE, "damaged", "it is missing")
    recorded = run.facts.get("metrics_file")
    if recorded and describe_files(run.folder, [path])[METRICS_FILE] != recorded:
        return Finding(METRICS_FILE, "damaged", f"it is not the file whose sha256 {RUN_FILE} recorded")
    try:
        lines = list(read_lines(path))
    except ValueError as error:
        return Finding(METRICS_FILE, "damaged", str(error))
    times = Counter((line["step"], line["split"], line["name"]) for line in lines)
    if twice := [key for key, number in times.items() if number > 1]:
        step, split, name = twice[0]
        return Finding(METRICS_FILE, "damaged", f"step {step} has {split}/{name} more than once")
    return Finding(METRICS_FILE, "sound", f"{len(lines)} lines, {'as recorded' if recorded else 'readable'}")


def _checkpoints(folder: Path, spec: RunSpec | None) -> list[Finding]:
    findings = []
    for checkpoint in checkpoints_in(folder / "checkpoints"):
        problems = damages(checkpoint)
        if not problems and spec and not belongs_to(checkpoint, spec):
            problems = [f"it belongs to a run with another spec than {RUN_FILE}"]
        findings.append(_finding(checkpoint.name, problems, "every file matches its sha256"))
    for place in sorted((folder / "checkpoints" / SET_ASIDE).glob("*")):
        findings.append(Finding(place.name, "absent", f"set aside as {place.relative_to(folder)}; nothing reads it"))
    return findings


def _model(run: Run) -> Finding:
    folder = run.folder / "model"
    if not folder.is_dir():
        finished = "the run is finished, and its folder model/ is not here"
        return Finding("model", "absent", finished if run.status == "finished" else "only a finished run saves one")
    problems = damages(folder)
    if not problems and read_manifest(folder).get("corpus") != run.corpus:
        problems = [f"its {MANIFEST_NAME} names another corpus than {RUN_FILE}"]
    return _finding("model", problems, "every file matches its sha256")


def _corpus(run: Run, spec: RunSpec, cache: Path) -> Finding:
    folder, absent = None, f"not in {cache}: it would be prepared again"
    try:
        folder = cache / "corpora" / corpus_key(spec.data, SOURCES[spec.data.source](spec.data))
    except (ValueError, OSError) as error:
        absent = f"its text is not on this machine ({error})"
    if folder is None or not folder.is_dir():
        if kept := prepared(run.facts["corpus"], cache=cache):
            return Finding("corpus", "sound", f"every file of {kept.folder} matches its sha256")
        return Finding("corpus", "absent", absent)
    problems = damages(folder)
    if not problems:
        facts: dict[str, Any] = read_manifest(folder).get("corpus", {})
        recorded = run.facts["corpus"]
        compared = (facts | recorded).keys() - {"dropped"}  # what lies beside the same text is another machine's matter
        changed = sorted(key for key in compared if facts.get(key) != recorded.get(key))
        if changed:
            problems = [f"its {MANIFEST_NAME} and {RUN_FILE} differ in {', '.join(changed)}"]
    return _finding("corpus", problems, f"every file of {folder} matches its sha256")


def _finding(part: str, problems: list[str], praise: str) -> Finding:
    return Finding(part, "damaged", "; ".join(problems)) if problems else Finding(part, "sound", praise)
