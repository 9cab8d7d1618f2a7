"""A study = many runs that are compared: finished ones are skipped, broken ones resumed, then one report."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from normfree.analysis.groups import is_over
from normfree.analysis.seeds import decimals
from normfree.data import prepare
from normfree.report import build_report
from normfree.spec.compose import CONF, Composed, compose_run, members, override
from normfree.spec.keys import build, nearest
from normfree.spec.run import RunSpec
from normfree.store.runs import RUN_FILE, DamagedRunError, divergence_text, find_runs, read_run
from normfree.training import InterruptedRunError, train
from normfree.training.environment import usable_cores
from normfree.training.workers import run_side_by_side

logger = logging.getLogger("normfree")
_STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # tag: 100 is a name
EXAMPLE = f"{CONF / 'studies' / 'quick.yaml'} shows one"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Group:
    """Runs that differ in variant and seed only."""

    variants: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)] = field(default_factory=lambda: [0])
    tag: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    """More `key: value` for these runs."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Study:
    """A study's YAML file."""

    name: str
    preset: str
    groups: Annotated[list[Group], Field(min_length=1)]
    mix: bool = False
    """The runs differ in more than variant and seed, e.g. in learning rate, and belong into one report all the same."""
    note: str = ""
    """What the report says about the study's weight as evidence."""
    set: dict[str, Any] = field(default_factory=dict)
    """More `key: value` for all runs."""

    def overrides(self) -> Iterator[list[str]]:
        """One list of `key=value` per run."""
        for group in self.groups:
            common = {"study": self.name, "preset": self.preset, "tag": group.tag} | self.set | group.set
            for seed in group.seeds:
                for variant in group.variants:
                    settings = common | {"variant": variant, "seed": seed}
                    yield [override(key, value) for key, value in settings.items()]

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
    if not path.is_file():
        unknown = f"unknown study {name!r}; {nearest(name, members('studies'))} (or give a YAML file of your own)"
        raise ValueError(f"{name} does not exist; {EXAMPLE}" if of_the_user else unknown)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return build(Study, {"name": path.stem, **values})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a study: {str(error).splitlines()[0]}; {EXAMPLE}") from None


def run_study(name: str, overrides: Sequence[str] = (), *, workers: int = 1) -> Path:
    """Train every run of a study and write its report; returns the page.

    `overrides` apply to every run. `workers` processes share the runs and the cores: small models give more tokens
    per second that way than with all cores on one run (docs/performance.md).

    Raises RuntimeError at the end when a run failed or the report cannot be made, ValueError for a wrong study,
    override, number of workers or record in the study's folder, InterruptedRunError or StoppedError on a signal.
    """
    if not 1 <= workers <= usable_cores():
        raise ValueError(f"workers={workers}: this machine has {usable_cores()} cores, so give 1 to {usable_cores()}")
    began = datetime.now(UTC).replace(microsecond=0)
    study = load_study(name)
    runs = study.runs_with(overrides)
    study_folder = runs[0].runs_dir / runs[0].spec.study
    _refuse_strangers(study, study_folder, runs)
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
            # A ValueError says itself what is wrong.
            logger.error("%s failed: %s", run.spec.name, error, exc_info=not isinstance(error, ValueError))
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


def _refuse_strangers(study: Study, folder: Path, runs: Sequence[Composed]) -> None:
    """Results that already lie in the study's folder come into its report: they must be readable and, unless the study
    mixes, of its recipe and corpus.

    Raises ValueError that names one that is not, before anything is trained. A damaged record of a run of the study is
    left to `train`, which mends it.
    """
    results = []
    for file in sorted(folder.glob(f"*/{RUN_FILE}")):
        try:
            results.append(read_run(file.parent))
        except DamagedRunError:
            if file.parent.name not in {run.spec.name for run in runs}:
                raise
    results = [] if study.mix else [run for run in results if is_over(run)]
    wanted = runs[0]
    corpus = prepare(wanted.spec.data, cache=wanted.cache_dir).fingerprint if results else ""
    for run in results:
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
    sessions = facts.get("sessions") if facts["status"] == "failed" else None
    return facts["error"] if sessions and datetime.fromisoformat(sessions[-1]["began"]) >= began else None


def _share_among(workers: int, name: str, runs: Sequence[Composed], overrides: Sequence[str]) -> None:
    """Let processes of the same study take one run after the other; what they leave is for the caller."""
    prepare(runs[0].spec.data, cache=runs[0].cache_dir)  # once, with its bar, before the processes ask for it
    threads = max(run.spec.train.threads or 1 for run in runs)
    command = [sys.executable, "-m", "normfree", "study", name, *overrides]
    logger.info("%d processes share %d runs, train.threads=%d each", workers, len(runs), threads)
    environment = {"OMP_NUM_THREADS": str(threads)}
    for status in filter(None, run_side_by_side(command, count=workers, environment=environment)):
        logger.warning("a process ended with status %d; runs that it left are tried again here", status)


def summary(folder: Path) -> str:
    """One line on a run: what it is, how it ended, its perplexity."""
    run = read_run(folder)
    if run.status == "diverged":
        return f"{run.label}, seed {run.seed}: {divergence_text(run.facts['divergence'])}"
    minutes = run.facts["wall_seconds"] / 60
    return f"{run.label}, seed {run.seed}: {run.status}, perplexity {decimals(run.perplexity)}, {minutes:.1f} min"


def refuse_twins(runs: Sequence[Composed], *, advice: str) -> None:
    """Raises ValueError, with `advice`, where two runs would share a folder."""
    folders = Counter(str(run.runs_dir / run.spec.study / run.spec.name) for run in runs)
    if twins := sorted(folder for folder, count in folders.items() if count > 1):
        raise ValueError(f"more than one run would be {', '.join(twins)}: {advice}")
