"""`normfree train -m`: many runs through Hydra's launchers (basic, joblib, submitit)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from normfree.compose import CONF, checked, forced, from_hydra
from normfree.records import read_run
from normfree.studies import summary
from normfree.training import InterruptedRunError, train
from normfree.training.process import prepare_process


class _Stopped(BaseException):
    """Carries a signal past Hydra, which would go on with the next job after an Exception."""

    def __init__(self, error: InterruptedRunError) -> None:
        super().__init__(error)
        self.error = error


def sweep(overrides: Sequence[str]) -> None:
    """Run every combination of the overrides' comma-separated values, each as one `train`.

    Raises InterruptedRunError on a signal, and what a job raised.
    """
    arguments = [forced(text) for text in checked(overrides)]
    before = sys.argv
    sys.argv = [before[0], "--multirun", *arguments]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a job's error reaches the caller instead of Hydra's stack trace
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base=None)(one_job)()
    except _Stopped as stopped:
        raise stopped.error from None
    finally:
        sys.argv = before


def one_job(composed: DictConfig) -> float:
    """Train one run of a sweep; returns its perplexity, which Hydra's sweepers can minimise."""
    prepare_process()
    job = from_hydra(composed)
    try:
        folder = train(job.spec, runs_dir=job.runs_dir, cache=job.cache_dir)
    except InterruptedRunError as error:
        raise _Stopped(error) from error
    print(f"{summary(folder)}\n{folder}")
    return read_run(folder).perplexity
