"""Train many runs: one after another here, in several processes, or as jobs of a cluster."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from normfree.analysis.seeds import decimals
from normfree.data import prepare
from normfree.measures import periods_of
from normfree.spec.compose import Job, read_words
from normfree.spec.keys import build
from normfree.store.runs import divergence_text, read_run
from normfree.training.environment import command_line, usable_cores
from normfree.training.process import prepare_process
from normfree.training.train import InterruptedRunError, train
from normfree.training.workers import run_side_by_side

logger = logging.getLogger("normfree")
_JOBS = TypeAdapter(list[Job])


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Launch:
    """Where the runs of a study or of `train -m` are trained."""

    workers: int = 1
    """Processes that share the runs and this machine's cores."""
    submit: Literal["slurm", "local"] | None = None
    """slurm: one cluster job for each run, through submitit (the extra `cluster`); local: the same on this machine."""
    submit_options: dict[str, Any] = field(default_factory=dict)
    """Parameters of submitit's AutoExecutor: submit.timeout_min=720, submit.slurm_partition=gpu, ..."""

    def __post_init__(self) -> None:
        cores = usable_cores()
        if not 1 <= self.workers <= cores:
            raise ValueError(f"workers={self.workers}: this machine has {cores} cores, so give 1 to {cores}")
        if self.submit and self.workers > 1:
            raise ValueError(f"workers={self.workers} and submit={self.submit}: give one of them")
        if self.submit_options and not self.submit:
            raise ValueError(
                f"submit.{next(iter(self.submit_options))}= is read with submit=slurm or submit=local only"
            )


def read_launch(words: Sequence[str]) -> tuple[Launch, list[str]]:
    """Split `key=value` words into the launch (workers=, submit=, submit.NAME=) and the words for the runs.

    Raises ValueError for a launch that cannot work.
    """
    others = [word for word in words if not re.match(r"workers=|submit[=.]", word)]
    values = read_words([word for word in words if word not in others])
    options = {key.removeprefix("submit."): value for key, value in values.items() if key.startswith("submit.")}
    settings = {key: value for key, value in values.items() if not key.startswith("submit.")}
    return build(Launch, {**settings, "submit_options": options}), others


def train_jobs(jobs: Sequence[Job], launch: Launch | None = None, *, note: str = "") -> list[str]:
    """Train runs that are not finished yet; returns "NAME (ERROR)" of each that failed.

    `note` is recorded with each run, for its report.

    Raises ValueError for jobs or a launch that cannot work, before anything is trained; InterruptedRunError or
    StoppedError on a signal.
    """
    launch = launch or Launch()
    check_jobs(jobs)
    jobs = [replace(job, command=job.command or command_line()) for job in jobs]  # other processes do not know it
    if launch.submit:
        return _submit(jobs, launch, note)
    began = datetime.now(UTC).replace(microsecond=0)
    if launch.workers != 1:
        jobs = _share(jobs, launch.workers, began, note)
    return _train_each(jobs, began, note)


def failure_message(jobs: Sequence[Job], failures: Sequence[str]) -> str:
    """One sentence that names the runs that failed."""
    return f"{len(failures)} of {len(jobs)} runs failed: {'; '.join(failures)}"


def check_jobs(jobs: Sequence[Job]) -> None:
    """Raises ValueError for a measure that does not exist: `train` refuses it too, but after the runs before it."""
    for job in jobs:
        periods_of(job.spec.probe.measures, job.spec.probe.every_steps)


def summary(folder: Path) -> str:
    """One line about a run: its variant, how it ended, its perplexity."""
    run = read_run(folder)
    if run.status == "diverged":
        return f"{run.label}, seed {run.seed}: {divergence_text(run.facts['divergence'])}"
    minutes = run.facts["wall_seconds"] / 60
    return f"{run.label}, seed {run.seed}: {run.status}, perplexity {decimals(run.perplexity)}, {minutes:.1f} min"


def _train_each(jobs: Sequence[Job], began: datetime, note: str) -> list[str]:
    """Train what no other process has finished, is training, or saw fail since `began`."""
    failures = []
    for number, job in enumerate(jobs, start=1):
        name = job.spec.name
        logger.info("run %d of %d: %s", number, len(jobs), name)
        if error := _failure_since(began, job.folder):
            logger.info("%s failed in another process; not tried again", name)
            failures.append(f"{name} ({error})")
            continue
        try:
            logger.info("%s", summary(_train(job, note)))
        except BlockingIOError:
            logger.info("another process is training %s; skipped here", name)
        except InterruptedRunError:
            raise
        except Exception as error:
            # The message of a ValueError is complete; other errors need their stack trace.
            logger.error("%s failed: %s", name, error, exc_info=not isinstance(error, ValueError))
            failures.append(f"{name} ({type(error).__name__}: {error})")
    return failures


def _train(job: Job, note: str) -> Path:
    return train(job.spec, runs_dir=job.runs_dir, cache=job.cache_dir, note=note, command=job.command)


def _failure_since(began: datetime, folder: Path) -> str | None:
    """The error of a run that failed after `began`; None for any other run."""
    try:
        facts = read_run(folder).facts
    except ValueError:  # not begun, or damaged
        return None
    sessions = facts.get("sessions") if facts["status"] == "failed" else None
    return facts["error"] if sessions and datetime.fromisoformat(sessions[-1]["began"]) >= began else None


def _share(jobs: Sequence[Job], workers: int, began: datetime, note: str) -> list[Job]:
    """Let several processes train the runs; returns the runs with their threads set, to try again what is left."""
    threads = {job.spec.train.threads for job in jobs}
    if None in threads and len(threads) > 1:
        raise ValueError(f"workers={workers}: set train.threads for all runs or for none")
    if threads == {None}:
        jobs = [
            replace(job, spec=replace(job.spec, train=replace(job.spec.train, threads=usable_cores() // workers)))
            for job in jobs
        ]
    prepare(jobs[0].spec.data, cache=jobs[0].cache_dir)  # once, with its bar, before the processes ask for it
    most = max(job.spec.train.threads or 1 for job in jobs)
    logger.info("%d processes share %d runs, train.threads=%d each", workers, len(jobs), most)
    work = {"began": began.isoformat(), "note": note, "jobs": _JOBS.dump_python(list(jobs), mode="json")}
    command = [sys.executable, "-m", "normfree.training.launch"]
    environment = {"OMP_NUM_THREADS": str(most)}
    for status in run_side_by_side(command, count=workers, environment=environment, standard_input=json.dumps(work)):
        if status:
            logger.warning("a process ended with status %d; what it left is tried again here", status)
    return list(jobs)


def _work() -> int:
    """Train the runs that standard input describes, as one of several processes; returns the exit status."""
    work = json.load(sys.stdin)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    prepare_process()
    jobs = _JOBS.validate_python(work["jobs"])
    try:
        return bool(_train_each(jobs, datetime.fromisoformat(work["began"]), work["note"]))
    except InterruptedRunError as error:
        logger.error("%s", error)
        return 128 + error.signal_number


class _SubmittedRun:
    """One run, trained in a job of a cluster."""

    def __init__(self, note: str) -> None:
        self.note = note

    def __call__(self, job: Job) -> str:
        prepare_process()
        return str(_train(job, self.note))

    def checkpoint(self, job: Job) -> Any:
        """Queue the same run again, after a time limit or preemption; it resumes from its newest checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job)


def _submit(jobs: Sequence[Job], launch: Launch, note: str) -> list[str]:
    """One job of the cluster for each run; waits for all of them."""
    try:
        import submitit
    except ImportError:
        raise ValueError(f"submit={launch.submit} needs submitit: pip install 'normfree[cluster]'") from None
    executor = submitit.AutoExecutor(folder=jobs[0].runs_dir / ".submit", cluster=launch.submit)
    try:
        executor.update_parameters(**{"timeout_min": 60, **launch.submit_options})
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"submit.*: submitit refuses these parameters: {error}") from None
    submitted = executor.map_array(_SubmittedRun(note), jobs)
    logger.info("submitted %d jobs; logs are in %s", len(submitted), executor.folder)
    failures = []
    for job, remote in zip(jobs, submitted, strict=True):
        if error := remote.exception():
            reason = str(error).strip().splitlines()[-1]
            failures.append(f"{job.spec.name} ({reason}; see {remote.paths.stderr})")
            logger.error("%s failed: %s", job.spec.name, reason)
        else:
            logger.info("%s", summary(job.folder))
    return failures


if __name__ == "__main__":
    sys.exit(_work())
