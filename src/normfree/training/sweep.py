"""`normfree train -m`: many runs through Hydra's launchers (basic, joblib, submitit)."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from normfree.spec.compose import CONF, Composed, checked, compose_run, forced, from_hydra
from normfree.store.runs import read_run
from normfree.training import InterruptedRunError, train
from normfree.training.process import prepare_process
from normfree.training.study import refuse_twins, summary


class _Stopped(BaseException):
    """Carries an InterruptedRunError past Hydra, which would go on with the next job after an Exception."""


def sweep(overrides: Sequence[str]) -> None:
    """Run every combination of the overrides' comma-separated values, each as one `train`.

    Raises what `jobs_of` raises before the first job, InterruptedRunError on a signal, and what a job raised.
    """
    words = checked(overrides)
    if not any(text.startswith("hydra/sweeper") for text in words):  # another sweeper chooses the values itself
        jobs_of(words)
    before, sys.argv = sys.argv, [sys.argv[0], "--multirun", *map(forced, words)]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a job's error reaches the caller instead of Hydra's stack trace
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base=None)(one_job)()
    except _Stopped as stopped:
        raise stopped.args[0] from None
    finally:
        sys.argv = before


def jobs_of(overrides: Sequence[str]) -> list[Composed]:
    """The runs of a sweep, as Hydra's own sweeper combines the overrides.

    Raises ValueError for what it cannot combine, for a run that cannot be composed and for two of one name.
    """
    of_runs = [text for text in checked(overrides) if not text.startswith("hydra")]
    try:
        (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(of_runs), max_batch_size=None)
    except HydraException as error:
        raise ValueError(f"{error}; hydra/sweeper=NAME takes another") from None
    runs = [compose_run(job) for job in jobs]
    refuse_twins(
        runs,
        advice="let the tag say what tells them apart, as in 'tag=lr${train.peak_learning_rate}', or, of runs that "
        "differ in data_seed alone and are seeds of one thing, the study: 'study=order${data_seed}'",
    )
    return runs


def one_job(composed: DictConfig) -> float:
    """Train one run of a sweep; returns its perplexity, which Hydra's sweepers can minimise."""
    prepare_process()
    job = from_hydra(composed)
    words = ["normfree", "train", *(text.removeprefix("++") for text in HydraConfig.get().overrides.task)]
    try:
        folder = train(job.spec, runs_dir=job.runs_dir, cache=job.cache_dir, command=shlex.join(words))
    except InterruptedRunError as error:
        raise _Stopped(error) from error
    print(f"{summary(folder)}\n{folder}")
    return read_run(folder).perplexity
