"""Group runs into seeds of one variant and recipe, and decide which groups may be compared."""

import math
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from normfree.analysis import published
from normfree.analysis.seeds import Summary, compact, summarise
from normfree.spec.families import FAMILIES, Score
from normfree.spec.keys import describe_keys
from normfree.spec.run import (
    NOT_DECIDING,
    NOT_RECIPE_FIELDS,
    PLACES_OF_TEXT,
    VARIANT_FIELDS,
    RunSpec,
    check_own_values,
    own_values,
)
from normfree.store.runs import Run

_RATE = "train.peak_learning_rate"


@dataclass(frozen=True)
class Group:
    """The seeds of one variant under one recipe, or one measured model."""

    name: str  # the variant in the paper's notation, its values of `compare_across`, and what distinguishes it
    runs: tuple[Run, ...]  # finished and diverged runs, one per seed
    unfinished: tuple[Run, ...]  # running, interrupted or failed runs, which have no result
    repeated: tuple[Run, ...]  # further runs of a seed that `runs` already contains
    is_baseline: bool = False  # true for the group that `baseline=` names: all others are compared with it

    @property
    def members(self) -> tuple[Run, ...]:
        """Its runs except repeated ones; those with a result come first."""
        return (*self.runs, *self.unfinished)

    @property
    def label(self) -> str:
        """The variant in the paper's notation."""
        return self.members[0].spec["label"]

    @property
    def is_trained(self) -> bool:
        """False for a model that was only measured."""
        return self.members[0].kind == "run"

    @property
    def score(self) -> Score:
        return self.members[0].headline

    @cached_property
    def comparison_key(self) -> Hashable:
        """Recipe and corpus; only groups with the same ones are compared."""
        return _comparison_key(self.members[0])

    @property
    def heatmap_run(self) -> Run:
        """The run whose heads are drawn: the first finished seed, else the first diverged one, else any."""
        return next((run for run in self.runs if run.status == "finished"), self.members[0])

    @property
    def scores(self) -> dict[Hashable, float]:
        """Final score by seed and data order; NaN for a diverged run."""
        return self.by_seed(lambda run: run.score)

    def by_seed(self, measure: Callable[[Run], Any]) -> dict[Hashable, Any]:
        """A number of its runs with a result, by seed and data order."""
        return {_seed(run): measure(run) for run in self.runs}


@dataclass(frozen=True)
class Part:
    """Groups that are shown together: those of one recipe, or all if the report does not mix recipes."""

    groups: list[Group]
    title: str = ""  # its studies, with the settings that distinguish it from other parts of these studies
    recipe: str = ""  # all settings that distinguish it from the other parts


def group_runs(runs: Sequence[Run], *, mix: bool = False, baseline: str = "") -> list[Group]:
    """Group the runs of one variant, recipe and corpus; the paper's variants come first, in its order.

    `baseline`: the label, variant or name of the groups to compare all others with. With `mix` each recipe becomes a
    group whose name says how it differs. Raises ValueError if runs with a result differ in corpus, precision or any
    other part of the recipe without `mix`, and if runs of one variant and tag differ in a key of `compare_across`.
    """
    if not runs:
        raise ValueError("no runs given: give a run folder or a folder of runs")
    results = [run for run in runs if run.has_result and run.kind == "run"]
    if not mix and (differing := _differing(results)):
        values = "; ".join(f"{key}: {_name_a_run_per_value(key, results)}" for key in differing)
        advice = "give runs of one recipe, or mix=true to show them side by side"
        raise ValueError(f"these runs differ in their recipe ({values}): {advice}")
    of_key: dict[Hashable, list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.has_result):
        folder = run.folder if run.kind == "measurement" else None  # measurements are never seeds of each other
        of_key.setdefault((run.label, folder, *_settings(run).items()), []).append(run)
    first_runs = [alike[0] for alike in of_key.values()]
    # Named separately, so that an unfinished run does not change the names of groups with a result.
    with_result = [run for run in first_runs if run.has_result]
    names = _names(with_result) + _names(first_runs)[len(with_result) :]
    groups = []
    for name, alike in zip(names, of_key.values(), strict=True):
        check_own_values({run.place: run.spec for run in alike})
        is_baseline = bool(baseline) and baseline in (name, alike[0].spec["label"], alike[0].spec.get("variant"))
        of_seed: dict[Hashable, Run] = {}
        for run in sorted((run for run in alike if run.has_result), key=_seed):
            of_seed.setdefault(_seed(run), run)
        chosen, unfinished = tuple(of_seed.values()), tuple(run for run in alike if not run.has_result)
        repeated = tuple(run for run in alike if run not in (*chosen, *unfinished))
        groups.append(Group(name, chosen, unfinished, repeated, is_baseline))
    return sorted(groups, key=_paper_first)


def parts_of(runs: Sequence[Run], *, mix: bool = False, baseline: str = "") -> list[Part]:
    """One part for each recipe and one for measured models if `mix` and the runs have several recipes; else one part.

    Raises ValueError as `group_runs` does, and for a baseline that no run has.
    """
    of_recipe: dict[Hashable, list[Run]] = {}
    for run in runs:
        of_recipe.setdefault(_comparison_key(run) if run.kind == "run" else "measured", []).append(run)
    models = of_recipe.pop("measured", [])
    parts = []
    if mix and len(of_recipe) > 1:
        first_runs = [alike[0] for alike in of_recipe.values()]
        keys = _differing(first_runs)
        for alike in of_recipe.values():
            first, studies = alike[0], ", ".join(dict.fromkeys(run.spec["study"] for run in alike))
            same_study = [run for run in first_runs if run.spec["study"] == first.spec["study"]]
            settings = _settings_text(first, _differing(same_study))
            title = f"{studies}: {settings}" if settings else studies
            parts.append(Part(group_runs(alike, baseline=baseline), title, _settings_text(first, keys)))
        parts += [Part(group_runs(models, baseline=baseline), "Measured models")] if models else []
    parts = parts or [Part(group_runs(runs, mix=mix, baseline=baseline))]
    groups = [group for part in parts for group in part.groups]
    if baseline and not any(group.is_baseline for group in groups):
        labels = ", ".join(dict.fromkeys(group.label for group in groups))
        raise ValueError(f"baseline={baseline} is not among these runs; their variants are {labels}")
    return parts


def score_of(groups: Sequence[Group]) -> Score:
    """The headline of the groups; that of decoders if there is no group."""
    return next((group.score for group in groups if group.is_trained), FAMILIES["decoder"].score)


def all_runs(groups: Sequence[Group]) -> list[Run]:
    return [run for group in groups for run in group.members]


def counterparts(group: Group, label: str, groups: Sequence[Group]) -> list[Group]:
    """Groups of `label` to compare `group` with: same recipe, a common seed, and the same tag if one of them has it."""
    comparable = [
        other
        for other in groups
        if (other.label, other.comparison_key) == (label, group.comparison_key)
        and other.scores.keys() & group.scores.keys()
    ]
    return [other for other in comparable if _tag(other.members[0]) == _tag(group.members[0])] or comparable


def scores_on_common_seeds(groups: Sequence[Group]) -> dict[str, Summary]:
    """Final score of each group with a result, over the seeds that all of them have, else over its own.

    This way no group is ahead because of the seeds it happens to have. NaN if any seed of a group is.
    """
    of_group = {group.name: group.scores for group in groups if group.runs}
    common = set.intersection(*map(set, of_group.values())) if of_group else set()
    return {
        name: summarise([value for seed, value in values.items() if seed in common or not common or math.isnan(value)])
        for name, values in of_group.items()
    }


def rate_grids(groups: Sequence[Group]) -> dict[str, dict[float, dict[Hashable, list[Run]]]]:
    """Runs by seed at each peak learning rate, of each variant and recipe that has several, whatever their tags."""
    of_recipe: dict[Hashable, list[Run]] = {}
    for run in (run for group in sorted(groups, key=_paper_first) if group.is_trained for run in group.runs):
        of_recipe.setdefault((run.spec["label"], *({**_settings(run), _RATE: ""}).items()), []).append(run)
    grids: dict[str, dict[float, dict[Hashable, list[Run]]]] = {}
    for alike in of_recipe.values():
        label = alike[0].spec["label"]
        recipes = [others[0] for others in of_recipe.values() if others[0].spec["label"] == label]
        settings = _settings_text(alike[0], sorted({*_differing(recipes, ignored=(_RATE,))} - _set_by_preset(recipes)))
        grid = grids.setdefault(f"{label} [{settings}]" if settings else label, {})
        for run in alike:
            grid.setdefault(run.spec["train"]["peak_learning_rate"], {}).setdefault(_seed(run), []).append(run)
    return {name: dict(sorted(grid.items())) for name, grid in grids.items() if len(grid) > 1}


def _paper_first(group: Group) -> tuple[int, str]:
    return [*published.ORDER, group.label].index(group.label), group.name


def _seed(run: Run) -> tuple[int, int]:
    return run.seed, run.spec["data_seed"]


def _tag(run: Run) -> str:
    return run.spec.get("tag") or ""


def _names(runs: Sequence[Run]) -> list[str]:
    """Each run's label, with the settings that distinguish it from runs of its label, and from runs of its tag.

    If a preset explains a setting, the preset is named instead.
    """
    set_by_preset, names = _set_by_preset(runs), []
    for run in runs:
        same_label = _differing([other for other in runs if other.label == run.label], ignored=())
        same_tag = _differing([other for other in runs if _tag(other) == _tag(run)])
        own = own_values(run.spec)
        values = ", ".join("lr " * (key == _RATE) + compact(value) for key, value in own.items())
        name = f"{run.label} ({values})" if own else run.label
        settings = _settings_text(run, sorted({*same_label, *same_tag} - set_by_preset - own.keys()))
        names.append(f"{name} [{settings}]" if settings else name)
    return tell_apart(names, runs)


def tell_apart(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The names of runs; where several share one, with their folder's path below the folder that holds them all."""
    distinct = list(names)
    for name in {name for name in names if names.count(name) > 1}:
        folders = {number: runs[number].folder.absolute() for number, other in enumerate(names) if other == name}
        shared = os.path.commonpath(folders.values())
        for number, folder in folders.items():
            distinct[number] = f"{name} ({folder.relative_to(shared)})"
    return distinct


def _set_by_preset(runs: Sequence[Run]) -> set[str]:
    """Settings that differ between presets only."""
    presets = {run.spec.get("preset") for run in runs}
    of_preset = ([run for run in runs if run.spec.get("preset") == preset] for preset in presets)
    return {*_differing(runs)}.difference({"preset", "corpus"}, *map(_differing, of_preset))


def _name_a_run_per_value(key: str, runs: Sequence[Run]) -> str:
    places = {_settings(run, with_places=True).get(key, "unset"): run.place for run in reversed(runs)}
    return ", ".join(f"{value} in {places[value]}" for value in sorted(places))


def _settings_text(run: Run, keys: Sequence[str]) -> str:
    """`steps=40, precision=bf16`; the text of a measurement has its file's name in place of a fingerprint."""
    values = _settings(run, with_places=True)
    if run.kind == "measurement":
        values["text"] = Path(run.facts["corpus"]["source"]).name
        keys = ["text" if key == "corpus" else key for key in keys]
    return ", ".join(f"{key.split('.')[-1]}={values.get(key, 'unset')}" for key in keys)


def _differing(runs: Sequence[Run], *, ignored: Sequence[str] = VARIANT_FIELDS) -> list[str]:
    """Sorted keys of the settings on which runs disagree, without the ignored ones."""
    several_corpora = len({run.corpus for run in runs}) > 1
    settings = [_settings(run, with_places=several_corpora) for run in runs]
    keys = {key for values in settings for key in values}
    differing = {key for key in keys.difference(ignored) if len({values.get(key) for values in settings}) > 1}
    # The fingerprint adds nothing if every combination of data settings has its own corpus.
    data = [tuple(item for item in values.items() if item[0].startswith("data.")) for values in settings]
    if len(set(data)) == len({(of_run, values["corpus"]) for of_run, values in zip(data, settings, strict=True)}):
        differing.discard("corpus")
    return sorted(differing)


def _comparison_key(run: Run) -> Hashable:
    return tuple(item for item in _settings(run).items() if item[0] not in VARIANT_FIELDS)


@cache
def _defaults() -> dict[str, Any]:
    return {key: default for key, (default, _) in describe_keys(RunSpec).items()}


def _settings(run: Run, *, with_places: bool = False) -> dict[str, str]:
    """Corpus and recipe in a fixed order, as `train.precision -> bf16`; with the paths of its text if `with_places`.

    A setting that did not exist when the run was recorded has its default. Keys of `compare_across` are "by variant",
    so that runs that all declare them have one recipe.
    """
    settings = dict(_defaults()) if run.kind == "run" else {}
    for name, value in run.spec.items():
        settings |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    settings |= dict.fromkeys(own_values(run.spec), "by variant")
    ignored = {*NOT_RECIPE_FIELDS, *NOT_DECIDING} - (set(PLACES_OF_TEXT) if with_places else set())
    return {"corpus": run.corpus[:12]} | {key: str(settings[key]) for key in sorted(settings.keys() - ignored)}
