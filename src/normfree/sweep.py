"""`normfree train -m`: many runs through Hydra's launchers (basic, joblib, submitit)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from normfree.compose import CONF, checked, forced, from_hydra


def sweep(overrides: Sequence[str]) -> None:
    """Run every combination of the overrides' comma-separated values, each as one `train`."""
    arguments = [forced(text) for text in checked(overrides)]
    before = sys.argv
    sys.argv = [before[0], "--multirun", *arguments]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a job's error reaches the caller instead of Hydra's stack trace
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base=None)(one_job)()
    finally:
        sys.argv = before


def one_job(composed: DictConfig) -> float:
    """Train one run of a sweep; returns its perplexity, which Hydra's sweepers can minimise."""
    from normfree.records import read_run
    from normfree.studies import summary
    from normfree.training import train
    from normfree.training.process import prepare_process

    prepare_process()
    job = from_hydra(composed)
    folder = train(job.spec, runs_dir=job.runs_dir, cache=job.cache_dir)
    print(f"{summary(folder)}\n{folder}")
    return read_run(folder).perplexity
