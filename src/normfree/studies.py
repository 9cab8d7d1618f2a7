"""A study = many runs that are compared: finished ones are skipped, broken ones resumed, then one report."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from normfree.analysis.groups import is_over
from normfree.analysis.seeds import decimals
from normfree.compose import CONF, Composed, compose_run, members, override
from normfree.config import RunSpec, nearest
from normfree.data import prepare
from normfree.records import RUN_FILE, DamagedRunError, find_runs, read_run
from normfree.report import build_report
from normfree.training import InterruptedRunError, train
from normfree.training.environment import usable_cores
from normfree.workers import run_side_by_side

logger = logging.getLogger("normfree")
EXAMPLE = f"{CONF / 'studies' / 'quick.yaml'} shows one"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in variant and seed only."""

    __pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    variants: list[str]
    seeds: list[int] = field(default_factory=lambda: [0])
    tag: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    """More `key: value` for these runs."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study's YAML file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    preset: str
    groups: list[Group]
    mix: bool = False
    """The runs differ in more than variant and seed, e.g. in learning rate, and belong into one report all the same."""
    note: str = ""
    """What the report says about the study's weight as evidence."""
    set: dict[str, Any] = field(default_factory=dict)
    """More `key: value` for all runs."""

    def overrides(self) -> Iterator[list[str]]:
        """One list of `key=value` per run."""
        for group in self.groups:
            common = [
                override("study", self.name),
                f"preset={self.preset}",
                *(override(key, value) for key, value in (self.set | group.set).items()),
                *([override("tag", group.tag)] if group.tag else []),
            ]
            for seed in group.seeds:
                for variant in group.variants:
                    yield [*common, f"variant={variant}", f"seed={seed}"]

    def runs_with(self, overrides: Sequence[str]) -> list[Composed]:
        """Its runs, each with `overrides` on top.

        Raises ValueError for one that cannot be composed, for two of one name, and for different recipes unless `mix`.
        """
        runs = [compose_run([*of_run, *overrides]) for of_run in self.overrides()]
        refuse_twins(runs, advice="give each group its own tag")
        kinds = {(run.spec.recipe(), run.spec.data.paths, run.spec.data.validation_paths) for run in runs}
        if not self.mix and len(kinds) > 1:
            raise ValueError(
                f"the runs of {self.name} differ in more than variant and seed, so no table may compare them unasked; "
                "say mix: true in the study's file, or make it two studies"
            )
        return runs


def load_study(name: str) -> Study:
    """A study by name, or from a YAML file of the user's. Raises ValueError for an unknown name or a wrong file."""
    of_the_user = name.endswith((".yaml", ".yml"))
    path = Path(name) if of_the_user else CONF / "studies" / f"{name}.yaml"
    if of_the_user and not path.is_file():
        raise ValueError(f"{name} does not exist; {EXAMPLE}")
    if not path.is_file():
        raise ValueError(
            f"unknown study {name!r}; {nearest(name, members('studies'))} (or give a YAML file of your own)"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        study = TypeAdapter(Study).validate_python({"name": path.stem, **values})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{path} is not a study: {key}: {problem['msg']}; {EXAMPLE}") from None
    except (yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a study: {str(error).splitlines()[0]}; {EXAMPLE}") from None
    if not list(study.overrides()):
        raise ValueError(f"{path} is not a study: it has no runs; {EXAMPLE}")
    return study


def run_study(name: str, overrides: Sequence[str] = (), *, workers: int = 1) -> Path:
    """Train every run of a study and write its report; returns the page.

    `overrides` apply to every run. `workers` processes share the runs and the cores: small models give more tokens
    per second that way than with all cores on one run (docs/performance.md). Runs that fail are named at the end,
    after the others were done.

    Raises RuntimeError when a run failed or the report cannot be made, ValueError for a wrong study, override or number
    of workers and for records in the study's folder that are damaged or of another recipe or corpus,
    InterruptedRunError or StoppedError on a signal.
    """
    if not 1 <= workers <= usable_cores():
        raise ValueError(f"workers={workers}: this machine has {usable_cores()} cores, so give 1 to {usable_cores()}")
    began = datetime.now(UTC).replace(microsecond=0)
    study = load_study(name)
    runs = study.runs_with(overrides)
    study_folder = runs[0].runs_dir / runs[0].spec.study
    _refuse_damaged(study_folder, {run.spec.name for run in runs})
    if not study.mix:
        _refuse_strangers(study_folder, runs[0])
    if workers > 1:
        threads = {run.spec.train.threads for run in runs}
        if None in threads and len(threads) > 1:
            raise ValueError(f"workers={workers}: give train.threads for all runs of {study.name} or for none")
        if threads == {None}:
            overrides = [*overrides, f"train.threads={usable_cores() // workers}"]
            runs = study.runs_with(overrides)
        _share_among(workers, name, runs, overrides)
    failed = []
    for number, run in enumerate(runs, start=1):
        logger.info("run %d of %d: %s", number, len(runs), run.spec.name)
        if error := _failure_since(began, study_folder / run.spec.name):
            logger.info("%s failed in another process; not tried again", run.spec.name)
            failed.append(f"{run.spec.name} ({error})")
            continue
        try:
            folder = train(run.spec, runs_dir=run.runs_dir, cache=run.cache_dir, note=study.note)
            logger.info("%s", summary(folder))
        except BlockingIOError:
            logger.info("%s is trained by another process; left to it", run.spec.name)
        except InterruptedRunError:
            raise
        except Exception as error:
            if isinstance(error, ValueError):  # says itself what is wrong
                logger.error("%s failed: %s", run.spec.name, error)
            else:
                logger.exception("%s failed", run.spec.name)
            failed.append(f"{run.spec.name} ({type(error).__name__}: {error})")
    told = f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}"
    if not list(study_folder.glob(f"*/{RUN_FILE}")):
        raise RuntimeError(f"{told}; there is nothing to report")
    try:
        page = build_report(find_runs([study_folder]), study_folder / "report", mix=study.mix, progress=True)
    except ValueError as error:
        raise RuntimeError(f"no report: {error}" + (f". {told}" if failed else "")) from error
    if failed:
        raise RuntimeError(f"{told}; the report {page} has the rest")
    return page


def _refuse_damaged(folder: Path, names: set[str]) -> None:
    """Raises DamagedRunError (a ValueError) for a damaged record that no run of the study will mend: the report would
    stop at it, after all the training."""
    for file in sorted(folder.glob(f"*/{RUN_FILE}")):
        if file.parent.name not in names:
            read_run(file.parent)


def _refuse_strangers(folder: Path, wanted: Composed) -> None:
    """Results that already lie in the study's folder come into its report, so they must be of its recipe and corpus.

    Raises ValueError that names one that is not, before anything is trained. A damaged record is left to `train`,
    which mends it.
    """
    present = []
    for file in sorted(folder.glob(f"*/{RUN_FILE}")):
        with suppress(DamagedRunError):
            present.append(read_run(file.parent))
    present = [run for run in present if is_over(run)]
    corpus = prepare(wanted.spec.data, cache=wanted.cache_dir).fingerprint if present else ""
    for run in present:
        what = "recipe" if RunSpec.from_dict(run.spec).recipe() != wanted.spec.recipe() else "corpus"
        if what == "recipe" or run.corpus != corpus:
            raise ValueError(
                f"{run.folder} is of another {what}, and one report cannot hold both: give study=NAME for a folder of "
                "its own, or move that run away"
            )


def _failure_since(began: datetime, folder: Path) -> str | None:
    """The error of a run that a process of this study tried and that failed; None for any other."""
    try:
        facts = read_run(folder).facts
    except ValueError:  # not begun, or damaged
        return None
    if facts["status"] != "failed" or not facts.get("sessions"):
        return None
    return facts["error"] if datetime.fromisoformat(facts["sessions"][-1]["began"]) >= began else None


def _share_among(workers: int, name: str, runs: Sequence[Composed], overrides: Sequence[str]) -> None:
    """Let processes of the same study take one run after the other; what they leave is for the caller."""
    prepare(runs[0].spec.data, cache=runs[0].cache_dir)  # once, with its bar, before the processes ask for it
    threads = {run.spec.train.threads for run in runs if run.spec.train.threads}
    command = [sys.executable, "-m", "normfree.cli", "study", name, *overrides]
    logger.info("%d processes share %d runs, train.threads=%s each", workers, len(runs), max(threads))
    environment = {"OMP_NUM_THREADS": str(max(threads))}
    for status in filter(None, run_side_by_side(command, count=workers, environment=environment)):
        logger.warning("a process ended with status %d; runs that it left are tried again here", status)


def summary(folder: Path) -> str:
    """One line on a run: what it is, how it ended, its perplexity."""
    run = read_run(folder)
    if run.status == "diverged":
        found = run.facts["divergence"]
        place = f"layer {found['layer']}" if found["layer"] is not None else found["module"]
        return f"{run.label}, seed {run.seed}: non-finite {found['kind']} at step {found['step']}, {place}"
    minutes = run.facts["wall_seconds"] / 60
    return f"{run.label}, seed {run.seed}: {run.status}, perplexity {decimals(run.perplexity)}, {minutes:.1f} min"


def refuse_twins(runs: Sequence[Composed], *, advice: str) -> None:
    """Raises ValueError, with `advice`, where two runs would share a folder."""
    folders = Counter(str(run.runs_dir / run.spec.study / run.spec.name) for run in runs)
    if twins := sorted(folder for folder, count in folders.items() if count > 1):
        raise ValueError(f"more than one run would be {', '.join(twins)}: {advice}")
