"""The verbs `data`, `train`, `study`, `verify` and `report`. Imports are local, so that --help stays fast."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from normfree.cli.options import Options, check_writable
from normfree.spec.families import FAMILIES
from normfree.store.runs import RUN_FILE, find_runs, read_run

if TYPE_CHECKING:
    from normfree.spec.compose import Job


class VerifyOptions(Options):
    cache_dir: Path | None = None
    """Where corpora are kept; unless given, NORMFREE_CACHE, else ~/.cache/normfree."""


class ReportOptions(Options):
    output: Path = Path("report")
    """Folder for the page, its figures and tables."""
    mix: bool = False
    """Show runs of different recipes or precisions on one page, each recipe in its own part."""
    baseline: str = ""
    """Label or variant to compare all others with; by default every pair with a common seed is compared."""
    all_figures: bool = False
    """Write every figure of the page as PDF and PNG, not only those that it shows without unfolding."""


class StatusOptions(Options):
    watch: bool = False
    """Print again every ten seconds until no run is under way (Ctrl-C ends it)."""


def data(source: str, words: Sequence[str]) -> None:
    """Prepare a corpus and describe it."""
    from normfree.data import prepare
    from normfree.spec.compose import compose_run
    from normfree.training.processes import prepare_process

    prepare_process()
    preset = ["preset=fashion-vit"] if source in FAMILIES["vision"].sources else []  # any of its family
    job = compose_run([*preset, f"data={source}", *words])
    print(prepare(job.spec.data, cache=job.cache_dir).describe())


def train(words: Sequence[str], *, many: bool = False, show: bool = False) -> None:
    """Train one run, or one for each combination of comma-separated values with -m."""
    from accelerate import PartialState

    from normfree.spec.compose import compose, compose_runs, control_of, read_words
    from normfree.training import train as train_run
    from normfree.training.jobs import read_launch, train_jobs
    from normfree.training.processes import prepare_process

    launch, of_runs = read_launch(words) if many else (None, words)
    if many:
        jobs = compose_runs(of_runs)
    else:
        values = read_words(of_runs)
        job = compose(values)
        jobs = [*filter(None, [control_of(values, job)]), job]
    if show:
        _show(jobs)
        return
    prepare_process()
    if many:
        try:
            train_jobs(jobs, launch)
        finally:
            for job in jobs:
                if (job.folder / RUN_FILE).is_file():
                    print(job.folder)
        return
    for job in jobs:
        folder = train_run(job.spec, runs_dir=job.runs_dir, cache=job.cache_dir)
        if PartialState().is_main_process:
            print(f"{read_run(folder)}\n{folder}")


def study(name: str, words: Sequence[str], *, show: bool = False) -> None:
    """Train all runs of a study, then report."""
    from normfree.spec.compose import read_words
    from normfree.spec.study import load_study
    from normfree.training.jobs import read_launch
    from normfree.training.processes import prepare_process
    from normfree.training.study import run_study

    launch, of_runs = read_launch(words)
    if show:
        from normfree.cost.training import describe_training_cost

        loaded = load_study(name)
        jobs = loaded.jobs(read_words(of_runs))
        print(f"# {describe_training_cost(jobs, loaded.tokens_per_epoch)}")
        _show(jobs)
        return
    prepare_process()
    page = run_study(name, of_runs, launch)
    scores = dict.fromkeys(family.score.name for family in FAMILIES.values())
    tables = (page.parent / "tables" / f"{score}.md" for score in scores)
    print("\n".join(table.read_text(encoding="utf-8") for table in tables if table.is_file()))
    print(f"The page: {page}")


def _show(jobs: Sequence[Job]) -> None:
    print(yaml.safe_dump_all([job.spec.to_dict() for job in jobs], sort_keys=False), end="")


def status(folders: Sequence[str], options: StatusOptions) -> None:
    """Print how far runs are: step, loss, tokens per second, time left, running or stopped."""
    from normfree.store.progress import preparing_folders, progress_lines

    while True:
        preparing = {folder: preparing_folders(Path(folder)) for folder in folders}
        recorded = [folder for folder in folders if not preparing[folder] or any(Path(folder).rglob(RUN_FILE))]
        runs = [run for run in find_runs(recorded) if run.kind == "run"]
        lines = [f"{place}  preparing the text" for places in preparing.values() for place in places]
        if not runs and not lines:
            raise ValueError(f"{', '.join(folders)}: measured models, no training run")
        print("\n".join([*lines, *progress_lines(runs)]), flush=True)
        if not options.watch or not (lines or any(run.state == "running" for run in runs)):
            return
        time.sleep(10)
        print()


def verify(name: str, options: VerifyOptions) -> None:
    """Check a run folder, its checkpoints, model and corpus; fail when one is damaged."""
    from normfree.store.verify import verify as verify_run

    findings = verify_run(name, cache=options.cache_dir)
    print("\n".join(map(str, findings)))
    damaged = [finding.part for finding in findings if finding.state == "damaged"]
    if damaged:
        raise ValueError(
            f"{name} is damaged: {', '.join(damaged)}. The `command` in its run.json goes on from what is sound; a "
            "finished run is left alone until its run.json is moved away"
        )


def report(folders: Sequence[str], options: ReportOptions) -> None:
    """Rebuild tables, figures and the page from run folders."""
    from normfree.report import build_report

    check_writable(options.output)
    page = build_report(find_runs(folders), **dict(options), progress=True)
    print(f"The page: {page}")
