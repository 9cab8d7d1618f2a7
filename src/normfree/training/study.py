"""Train all runs of a study, then write one report. Finished runs are skipped, broken ones resumed."""

import logging
from collections.abc import Sequence
from pathlib import Path

from normfree.cost.training import describe_training_cost
from normfree.data import prepare
from normfree.report import build_report
from normfree.spec.compose import Job, read_words
from normfree.spec.run import RunSpec
from normfree.spec.study import Study, load_study
from normfree.store.runs import RUN_FILE, DamagedRunError, find_runs, read_run
from normfree.training.jobs import Launch, train_jobs
from normfree.training.objectives import find_donors

logger = logging.getLogger("normfree")


def run_study(name: str, words: Sequence[str] = (), launch: Launch | None = None) -> Path:
    """Train every run of a study and write its report; returns the page.

    `words` (`key=value`) apply to every run. Raises RuntimeError at the end when a run failed or the report cannot be
    made; ValueError, before training, for what cannot work; InterruptedRunError on a signal.
    """
    study = load_study(name)
    jobs = study.jobs(read_words(words))
    folder = jobs[0].folder.parent
    _check_earlier_results(study, folder, jobs)
    for places in dict.fromkeys(job.spec.train.entropy_profile for job in jobs):
        find_donors(places)
    logger.info("%s: %s", study.name, describe_training_cost(jobs, study.tokens_per_epoch))
    failure = ""
    try:
        train_jobs(jobs, launch)
    except RuntimeError as error:
        failure = str(error)
    if not list(folder.glob(f"*/{RUN_FILE}")):
        raise RuntimeError(f"{failure}; there is nothing to report")
    try:
        page = build_report(find_runs([folder]), folder / "report", mix=study.mix, progress=True)
    except ValueError as error:
        raise RuntimeError(f"no report: {error}{'. ' * bool(failure)}{failure}") from error
    if failure:
        raise RuntimeError(f"{failure}; the report {page} has the rest")
    return page


def _check_earlier_results(study: Study, folder: Path, jobs: Sequence[Job]) -> None:
    """Raises ValueError if the folder holds an unreadable run or, unless the study mixes, another recipe or corpus."""
    spec, corpus = jobs[0].spec, ""
    for file in sorted(folder.glob(f"*/{RUN_FILE}")):
        try:
            run = read_run(file.parent)
        except DamagedRunError:
            if file.parent.name in {job.spec.name for job in jobs}:
                continue  # `train` repairs it
            raise
        if study.mix or not run.has_result:
            continue
        corpus = corpus or prepare(spec.data, cache=jobs[0].cache_dir).fingerprint
        same_recipe = RunSpec.from_dict(run.spec).recipe() == spec.recipe()
        if not same_recipe or run.corpus != corpus:
            advice = "give study=NAME for a folder of its own, or move that run away"
            kind = "corpus" if same_recipe else "recipe"
            raise ValueError(f"{run.folder} has another {kind}, and one report cannot hold both: {advice}")
