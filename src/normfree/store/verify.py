"""Verify a run folder: its records, checkpoints, saved model and corpus."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from normfree.files import MANIFEST_NAME, damages, default_cache, fingerprint, read_manifest
from normfree.spec.run import RunSpec
from normfree.store.checkpoints import SET_ASIDE, checkpoints_in, problems_of
from normfree.store.runs import METRICS_FILE, RUN_FILE, DamagedRunError, Run, read_lines, read_run

State = Literal["sound", "damaged", "absent"]


@dataclass(frozen=True)
class Finding:
    """The result for one part of a run folder."""

    part: str
    """run.json, metrics.jsonl, checkpoint-100, model or corpus."""
    state: State
    """absent is no damage: the part was never written, or is on another machine."""
    detail: str

    def __str__(self) -> str:
        return f"{self.state:<8}{self.part:<18}{self.detail}"


def verify(folder: Path | str, *, cache: Path | None = None) -> list[Finding]:
    """Check every file of a run folder that has a recorded hash, without changing anything.

    `cache` is the folder of corpora. Raises ValueError when `folder` is no run folder or has another format.
    """
    folder = Path(folder)
    try:
        run = read_run(folder)
    except DamagedRunError as error:
        return [Finding(RUN_FILE, "damaged", str(error)), *_checkpoints(folder, None)]
    if run.kind == "measurement":
        return [Finding(RUN_FILE, "sound", f"a measurement of {run.label}"), _metrics(run)]
    try:
        spec = RunSpec.from_dict(run.spec)
    except ValueError as error:
        return [Finding(RUN_FILE, "damaged", f"its spec is invalid: {error}"), *_checkpoints(folder, None)]
    problems = []
    if run.facts.get("spec_fingerprint") not in (None, fingerprint(run.spec)):  # older records have none
        problems.append("its spec does not match its fingerprint")
    if run.status == "finished" and not run.facts.get("final"):
        problems.append("it is finished but has no result")
    return [
        _finding(RUN_FILE, problems, f"{run.label}, seed {run.seed}: {run.state}, {run.facts['steps_done']} steps"),
        _metrics(run),
        *_checkpoints(folder, spec),
        _model(run),
        _corpus(run, cache or default_cache()),
    ]


def _metrics(run: Run) -> Finding:
    path, problems, lines = run.folder / METRICS_FILE, [], []
    if not path.is_file():
        problems = ["it is missing"]
    elif not run.metrics_match_record():
        problems = [f"its sha256 is not the one in {RUN_FILE}"]
    else:
        try:
            lines = list(read_lines(path))
        except ValueError as error:
            problems = [str(error)]
    times = Counter((line["step"], line["split"], line["name"]) for line in lines)
    problems += [f"step {step} has {split}/{name} twice" for (step, split, name), count in times.items() if count > 1]
    return _finding(METRICS_FILE, problems[:1], f"{len(lines)} lines")


def _checkpoints(folder: Path, spec: RunSpec | None) -> list[Finding]:
    checkpoints, moved = checkpoints_in(folder / "checkpoints"), sorted((folder / "checkpoints" / SET_ASIDE).glob("*"))
    findings = [_finding(each.name, problems_of(each, spec), "every file matches its sha256") for each in checkpoints]
    return findings + [
        Finding(each.name, "absent", f"moved to {each.relative_to(folder)} and no longer used") for each in moved
    ]


def _model(run: Run) -> Finding:
    folder = run.folder / "model"
    if not folder.is_dir():
        finished = "the run is finished, but model/ is not here"
        return Finding("model", "absent", finished if run.status == "finished" else "only a finished run saves one")
    problems = damages(folder)
    if not problems and read_manifest(folder).get("corpus") != run.corpus:
        problems = [f"its {MANIFEST_NAME} names another corpus than {RUN_FILE}"]
    return _finding("model", problems, "every file matches its sha256")


def _corpus(run: Run, cache: Path) -> Finding:
    problems = []
    for folder in sorted((cache / "corpora").glob("[!.]*")):
        try:
            corpus = read_manifest(folder).get("corpus", {})
        except ValueError as error:
            problems.append(str(error))
            continue
        if corpus.get("fingerprint") == run.corpus:
            return _finding("corpus", damages(folder), f"every file of {folder} matches its sha256")
    if problems:
        return Finding("corpus", "damaged", "; ".join(problems))
    return Finding("corpus", "absent", f"not in {cache}; training would prepare it again")


def _finding(part: str, problems: list[str], detail: str) -> Finding:
    return Finding(part, "damaged", "; ".join(problems)) if problems else Finding(part, "sound", detail)
