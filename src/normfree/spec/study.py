"""A study: its YAML file, and the runs it stands for."""

import re
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from normfree.spec.compose import CONF, NAMES, Job, check_folders_differ, compose, members
from normfree.spec.keys import build, nearest
from normfree.spec.run import RunSpec, check_own_values

_CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # tag: 100 is a name
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
EXAMPLE = f"{CONF / 'studies' / 'quick.yaml'} shows one"


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Group:
    """Runs that differ in variant and seed only."""

    variants: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)] = field(default_factory=lambda: [0])
    data_seed: int | Literal["same"] | None = None
    """Order of the data; `same`: each run's own seed, so that seeds differ in initial weights and in this order."""
    tag: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    """More `key: value` for these runs."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Study:
    name: str
    preset: str
    groups: Annotated[list[Group], Field(min_length=1)]
    compare_across: tuple[str, ...] = ()
    """Keys of which each variant has its own value, e.g. train.peak_learning_rate: one table compares them even so."""
    mix: bool = False
    """Allow runs that differ in more than variant and seed, e.g. in learning rate, in one report."""
    note: str = ""
    """What the report says about the study's weight as evidence."""
    tokens_per_epoch: int | None = None
    """Tokens of the corpus, to say what runs of `train.epochs` will cost before it is prepared."""
    set: dict[str, Any] = field(default_factory=dict)
    """More `key: value` for all runs."""

    def jobs(self, values: Mapping[str, Any] | None = None) -> list[Job]:
        """The study's runs, the first seed of every group before the next, each with `values` on top."""
        jobs, across = [], {"compare_across": list(self.compare_across)}
        for group in self.groups:
            common = {"study": self.name, "preset": self.preset, "tag": group.tag} | across | self.set | group.set
            if group.data_seed is not None:
                common["data_seed"] = "${seed}" if group.data_seed == "same" else group.data_seed
            for key, value in common.items():
                if isinstance(value, str) and key not in NAMES and _EXPONENT.fullmatch(value):
                    common[key] = float(value)  # PyYAML reads 1e-3 as text
            for seed in group.seeds:
                for variant in group.variants:
                    job = compose(common | {"variant": variant, "seed": seed} | dict(values or {}))
                    jobs.append(replace(job, note=self.note))
        check_folders_differ(jobs, advice="give each group its own tag")
        first: dict[tuple[str, ...], RunSpec] = {}
        for spec in (job.spec for job in jobs):
            earlier = first.setdefault((spec.variant, spec.tag, spec.recipe()), spec)
            check_own_values({run.name: run.to_dict() for run in (earlier, spec)})
        recipes = {(job.spec.recipe(), *job.spec.places_of_text) for job in jobs}
        if not self.mix and len(recipes) > 1:
            advice = "add mix: true to the study's file, make it two studies, or declare compare_across: [KEY]"
            raise ValueError(f"runs of {self.name} differ in more than variant and seed, for one table: {advice}")
        return sorted(jobs, key=lambda job: job.spec.seed)


def load_study(name: str) -> Study:
    """Load a study by name, or from a YAML file. Raises ValueError for an unknown name or a wrong file."""
    is_file = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_file else CONF / "studies" / f"{name}.yaml"
    if not path.is_file():
        unknown = f"unknown study {name!r}; {nearest(name, members('studies'))} (or give a YAML file of your own)"
        raise ValueError(f"{name} does not exist; {EXAMPLE}" if is_file else unknown)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return build(Study, {"name": path.stem, **values})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a study: {str(error).splitlines()[0]}; {EXAMPLE}") from None
