"""Train many runs: one after another, in several processes of this machine, or as jobs of a cluster."""

import itertools
import logging
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from normfree.cost.estimate import GIB, check_memory
from normfree.data import prepare
from normfree.files import folder_lock
from normfree.measures import periods_of
from normfree.spec.compose import Job, read_words
from normfree.spec.keys import build
from normfree.store.progress import progress_lines
from normfree.store.runs import OVER, read_run
from normfree.training.arguments import is_done
from normfree.training.machine import command_line, usable_cores
from normfree.training.processes import prepare_process
from normfree.training.signals import InterruptedRunError, handle_signals, stopping_signals
from normfree.training.train import train

logger = logging.getLogger("normfree")

TABLE_SECONDS = 60.0
"""Time between two tables of progress of processes that share runs."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Launch:
    """Where the runs of a study or of `train -m` are trained."""

    workers: int = 1
    """Processes that share the runs and this machine's cores, or its GPU."""
    submit: Literal["slurm", "local"] | None = None
    """slurm: one cluster job for each run, through submitit (the extra `cluster`); local: the same on this machine."""
    submit_options: dict[str, Any] = field(default_factory=dict)
    """Parameters of submitit's AutoExecutor: submit.timeout_min=720, submit.slurm_partition=gpu, ..."""

    def __post_init__(self) -> None:
        cores = usable_cores()
        if self.workers < 1 or (self.workers > cores and not torch.cuda.is_available()):
            raise ValueError(f"workers={self.workers}: this machine has {cores} cores, so give 1 to {cores}")
        if self.submit and self.workers > 1:
            raise ValueError(f"workers={self.workers} and submit={self.submit}: give one of them")
        if self.submit_options and not self.submit:
            name = next(iter(self.submit_options))
            raise ValueError(f"submit.{name}= is read with submit=slurm or submit=local only")


def read_launch(words: Sequence[str]) -> tuple[Launch, list[str]]:
    """Split `key=value` words into the launch (workers=, submit=, submit.NAME=) and the words for the runs."""
    others = [word for word in words if not re.match(r"workers=|submit[=.]", word)]
    values = read_words([word for word in words if word not in others])
    options = {key.removeprefix("submit."): value for key, value in values.items() if key.startswith("submit.")}
    settings = {key: value for key, value in values.items() if not key.startswith("submit.")}
    return build(Launch, {**settings, "submit_options": options}), others


def train_jobs(jobs: Sequence[Job], launch: Launch | None = None) -> None:
    """Train runs that are not finished yet.

    Raises ValueError for jobs, a launch or a text that cannot work, before anything is trained; RuntimeError at the end
    if runs failed; InterruptedRunError on a signal.
    """
    launch = launch or Launch()
    for job in jobs:  # `train` refuses a wrong measure too, but after the runs before it
        periods_of(job.spec.probe.measures, job.spec.probe.every_steps)
    jobs = [replace(job, command=job.command or command_line()) for job in jobs]  # other processes do not know it
    failures: dict[int, str] = {}
    left: Iterable[int] = range(len(jobs))
    if launch.submit:
        failures, left = _submit(jobs, launch), ()
    else:
        if launch.workers > 1 and torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(0)
            for job in jobs:
                check_memory(job.spec, gpu.total_memory / GIB, name=gpu.name, runs=min(launch.workers, len(jobs)))
        _prepare_texts(jobs)
    if launch.workers > 1:
        threads = max(1, usable_cores() // launch.workers)
        for number, job in enumerate(jobs):
            train_spec = replace(job.spec.train, threads=job.spec.train.threads or threads)
            jobs[number] = replace(job, spec=replace(job.spec, train=train_spec))
        failures = _share(jobs, launch.workers)
        left = [n for n, job in enumerate(jobs) if n not in failures and not is_done(job.folder, job.spec)]
    failures |= _train_each(jobs, left)
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(jobs)} runs failed: {'; '.join(failures.values())}")


def _prepare_texts(jobs: Sequence[Job]) -> None:
    """Prepare the texts of unfinished runs, each once. Raises ValueError for a text that would fail all its runs.

    The folder of the runs is locked meanwhile, by which `normfree status` sees it; another study there waits.
    """
    jobs_by_text: dict[Any, Job] = {}
    for job in jobs:
        with suppress(ValueError):  # the folder holds another run, which `train` says in its turn
            if not is_done(job.folder, job.spec):
                jobs_by_text.setdefault((job.spec.data, job.cache_dir), job)
    for job in jobs_by_text.values():
        with folder_lock(job.folder.parent, on_wait=lambda owner: logger.info("waiting for the text of %s", owner)):
            prepare(job.spec.data, cache=job.cache_dir)


def _train(job: Job, *, progress: bool = True) -> Path:
    return train(
        job.spec, runs_dir=job.runs_dir, cache=job.cache_dir, note=job.note, command=job.command, progress=progress
    )


def _train_each(jobs: Sequence[Job], numbers: Iterable[int], *, progress: bool = True) -> Iterator[tuple[int, str]]:
    """Train the runs of these numbers; yields the number and the error of each that fails."""
    for number in numbers:
        name = jobs[number].spec.name
        logger.info("run %d of %d: %s", number + 1, len(jobs), name)
        try:
            logger.info("%s", read_run(_train(jobs[number], progress=progress)))
        except BlockingIOError:
            logger.info("another process is training %s; skipped here", name)
        except InterruptedRunError:
            raise
        except Exception as error:
            # The message of a ValueError is complete; other errors need their stack trace.
            logger.error("%s failed: %s", name, error, exc_info=not isinstance(error, ValueError))
            yield number, f"{name} ({type(error).__name__}: {error})"


def _share(jobs: Sequence[Job], workers: int) -> dict[int, str]:
    """Let several processes train the runs, each taking the next one; returns the errors of those that failed.

    A signal is passed on once: the processes have sessions of their own, since a Ctrl-C that reached them twice would
    make a run leave without a checkpoint. A run of a process that died is left.
    """
    logger.info("%d processes share %d runs, train.threads=%s each", workers, len(jobs), jobs[0].spec.train.threads)
    context = multiprocessing.get_context("spawn")
    numbers, queue = context.SimpleQueue(), context.SimpleQueue()
    processes = [context.Process(target=_work, args=(jobs, numbers, queue), daemon=True) for _ in range(workers)]
    received: list[int] = []
    passed_on, next_table = 0, time.monotonic() + TABLE_SECONDS
    failures: dict[int, str] = {}
    with handle_signals(lambda number, _frame: received.append(number), stopping_signals()):
        for process in processes:
            process.start()
        for number in (*range(len(jobs)), *[None] * workers):  # None: nothing is left
            numbers.put(number)
        while True:
            alive = [process for process in processes if process.is_alive()]
            while not queue.empty():
                failures |= [queue.get()]
            if not alive:
                break
            new = received[passed_on:]
            passed_on += len(new)
            for process, number in itertools.product(alive, new):
                os.kill(cast(int, process.pid), number)
            if time.monotonic() >= next_table:
                next_table = time.monotonic() + TABLE_SECONDS
                logger.info("%s", progress_table(jobs))
            wait([process.sentinel for process in alive], timeout=0.2)
    if received:
        outcome = f"was stopped by signal {received[0]}; the same command resumes its runs"
        raise InterruptedRunError(jobs[0].folder.parent, received[0], outcome)
    for status in filter(None, (process.exitcode for process in processes)):
        logger.warning("a process ended with status %d; the runs that it left are trained here", status)
    return failures


def progress_table(jobs: Sequence[Job]) -> str:
    """How many runs are over, and a line for each that is under way."""
    runs = []
    for job in jobs:
        with suppress(OSError, ValueError):  # not begun, or damaged
            runs.append(read_run(job.folder))
    title = f"{sum(run.status in OVER for run in runs)} of {len(jobs)} runs are over"
    return "\n".join([title, *progress_lines([run for run in runs if run.state == "running"])])


def _work(jobs: Sequence[Job], numbers: Any, failures: Any) -> None:
    """Train runs as one of several processes, without bars: those of two processes would overwrite each other."""
    os.setsid()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    # Progress is in the parent's table, and what a run needs was checked there.
    logger.addFilter(lambda line: line.module not in ("callbacks", "arguments"))
    prepare_process()
    try:
        for failure in _train_each(jobs, iter(numbers.get, None), progress=False):
            failures.put(failure)
    except InterruptedRunError as error:
        logger.error("%s", error)
        sys.exit(128 + error.signal_number)


class _ClusterRun:
    """Trains one run in a job of a cluster."""

    def __call__(self, job: Job) -> str:
        prepare_process()
        return str(_train(job))

    def checkpoint(self, job: Job) -> Any:
        """Queue the same run again, after a time limit or preemption; it resumes from its newest checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job)


def _submit(jobs: Sequence[Job], launch: Launch) -> dict[int, str]:
    """One job of the cluster for each run; waits for all of them and returns the errors of those that failed."""
    try:
        import submitit
    except ImportError:
        raise ValueError(f"submit={launch.submit} needs submitit: pip install 'normfree[cluster]'") from None
    executor = submitit.AutoExecutor(folder=jobs[0].runs_dir / ".submit", cluster=launch.submit)
    try:
        executor.update_parameters(**{"timeout_min": 60, **launch.submit_options})
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"submit.*: submitit refuses these parameters: {error}") from None
    submitted = executor.map_array(_ClusterRun(), jobs)
    logger.info("submitted %d jobs; logs are in %s", len(submitted), executor.folder)
    failures = {}
    for number, (job, remote) in enumerate(zip(jobs, submitted, strict=True)):
        if error := remote.exception():
            reason = str(error).strip().splitlines()[-1]
            failures[number] = f"{job.spec.name} ({reason}; see {remote.paths.stderr})"
            logger.error("%s failed: %s", job.spec.name, reason)
        else:
            logger.info("%s", read_run(job.folder))
    return failures
