"""What each verb of the command line does. Imports are local, so that `normfree --help` and `report` stay light."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from normfree.spec.compose import Composed

OPTIONS = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class VerifyOptions:
    """Keys of `normfree verify`."""

    cache_dir: Path | None = None
    """Where corpora are kept; unless given, NORMFREE_CACHE, else ~/.cache/normfree."""


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class ReportOptions:
    """Keys of `normfree report`."""

    output: Path = Path("report")
    """Folder for the page, its figures and tables."""
    mix: bool = False
    """Put runs of different recipes or precisions into one table."""


def data(source: str, overrides: Sequence[str]) -> None:
    """Prepare a corpus and describe it."""
    from normfree.data import prepare
    from normfree.spec.compose import compose_run
    from normfree.training.process import prepare_process

    prepare_process()
    composed = compose_run([f"data={source}", *overrides])
    print(prepare(composed.spec.data, cache=composed.cache_dir).describe())


def train(overrides: Sequence[str], *, many: bool = False, show: bool = False) -> None:
    """Train one run; many with -m; print it as YAML and train nothing with --cfg."""
    from accelerate import PartialState

    from normfree.spec.compose import compose_run
    from normfree.training import train as train_run
    from normfree.training.process import prepare_process
    from normfree.training.study import summary
    from normfree.training.sweep import jobs_of, sweep

    if show:
        _show(jobs_of(overrides) if many else [compose_run(overrides)])
        return
    if many:
        sweep(overrides)
        return
    prepare_process()
    composed = compose_run(overrides)
    folder = train_run(composed.spec, runs_dir=composed.runs_dir, cache=composed.cache_dir)
    if PartialState().is_main_process:
        print(f"{summary(folder)}\n{folder}")


def study(name: str, overrides: Sequence[str], *, show: bool = False) -> None:
    """Train all runs of a study, then report; print them as YAML and train nothing with --cfg."""
    from normfree.training.process import prepare_process
    from normfree.training.study import load_study, run_study

    of_runs = [word for word in overrides if not word.startswith("workers=")]
    workers = [word.removeprefix("workers=") for word in overrides if word.startswith("workers=")] or ["1"]
    if not workers[-1].isdigit():
        raise ValueError(f"workers={workers[-1]}: give a whole number of processes, e.g. workers=2")
    if show:
        _show(load_study(name).runs_with(of_runs))
        return
    prepare_process()
    page = run_study(name, of_runs, workers=int(workers[-1]))
    print((page.parent / "tables" / "perplexity.md").read_text(encoding="utf-8"))
    print(f"The page: {page}")


def _show(runs: Sequence[Composed]) -> None:
    print(yaml.safe_dump_all([run.spec.to_dict() for run in runs], sort_keys=False), end="")


def verify(name: str, options: VerifyOptions) -> None:
    """Check a run folder, its checkpoints, model and corpus; fail when one is damaged."""
    from normfree.training.verify import verify as verify_run

    findings = verify_run(name, cache=options.cache_dir)
    print("\n".join(map(str, findings)))
    damaged = [finding.part for finding in findings if finding.state == "damaged"]
    if damaged:
        raise ValueError(
            f"{name} is damaged: {', '.join(damaged)}. The `command` in its run.json goes on from what is sound; a "
            "finished run is left alone until its run.json is moved away"
        )


def report(places: Sequence[str], options: ReportOptions) -> None:
    """Rebuild tables, figures and the page from run folders."""
    from normfree.report import build_report
    from normfree.store.runs import find_runs

    check_writable(options.output)
    print(f"The page: {build_report(find_runs(places), options.output, mix=options.mix, progress=True)}")


def check_writable(output: Path) -> None:
    """Raises ValueError for a folder that could not be made, or not be written in."""
    existing = next(place for place in (output.absolute(), *output.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"output={output}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"output={output}: {existing} may not be written in; name another folder")
