"""Train all runs of a study, then write one report. Finished runs are skipped, broken ones resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from normfree.data import prepare
from normfree.report import build_report
from normfree.spec.compose import Job, read_words
from normfree.spec.run import RunSpec
from normfree.spec.study import Study, load_study
from normfree.store.runs import RUN_FILE, DamagedRunError, find_runs, read_run
from normfree.training.launch import Launch, failure_message, train_jobs


def run_study(name: str, words: Sequence[str] = (), launch: Launch | None = None) -> Path:
    """Train every run of a study and write its report; returns the page.

    `words` (`key=value`) apply to every run.

    Raises RuntimeError at the end when a run failed or the report cannot be made; ValueError for an invalid study, key
    or launch option, or an unreadable run in the study's folder; InterruptedRunError or StoppedError on a signal.
    """
    study = load_study(name)
    jobs = study.jobs(read_words(words))
    folder = jobs[0].folder.parent
    _check_earlier_results(study, folder, jobs)
    failures = train_jobs(jobs, launch, note=study.note)
    if not list(folder.glob(f"*/{RUN_FILE}")):
        raise RuntimeError(f"{failure_message(jobs, failures)}; there is nothing to report")
    try:
        page = build_report(find_runs([folder]), folder / "report", mix=study.mix, progress=True)
    except ValueError as error:
        cause = f". {failure_message(jobs, failures)}" if failures else ""
        raise RuntimeError(f"no report: {error}{cause}") from error
    if failures:
        raise RuntimeError(f"{failure_message(jobs, failures)}; the report {page} has the rest")
    return page


def _check_earlier_results(study: Study, folder: Path, jobs: Sequence[Job]) -> None:
    """Raises ValueError, before training, if the folder holds a run that the report could not include.

    That is an unreadable run or, unless the study mixes, one with another recipe or corpus. A damaged record of one of
    the study's own runs is allowed: `train` repairs it.
    """
    results = []
    for file in sorted(folder.glob(f"*/{RUN_FILE}")):
        try:
            results.append(read_run(file.parent))
        except DamagedRunError:
            if file.parent.name not in {job.spec.name for job in jobs}:
                raise
    results = [] if study.mix else [run for run in results if run.has_result]
    spec = jobs[0].spec
    corpus = prepare(spec.data, cache=jobs[0].cache_dir).fingerprint if results else ""
    for run in results:
        same_recipe = RunSpec.from_dict(run.spec).recipe() == spec.recipe()
        if not same_recipe or run.corpus != corpus:
            what = "corpus" if same_recipe else "recipe"
            raise ValueError(
                f"{run.folder} has another {what}, and one report cannot hold both: give study=NAME for a folder of "
                "its own, or move that run away"
            )
