"""Group runs into seeds of one variant and recipe, and decide which groups may be compared."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from normfree.analysis import published
from normfree.analysis.seeds import Summary, summarise
from normfree.spec.run import NOT_DECIDING, NOT_RECIPE_FIELDS, PLACES_OF_TEXT, VARIANT_FIELDS, recipe_of
from normfree.store.runs import OVER, Run


@dataclass(frozen=True)
class Group:
    """The seeds of one variant under one recipe."""

    name: str
    """The variant in the paper's notation, plus whatever distinguishes it from groups with the same label."""
    label: str
    recipe: str
    """Fingerprint of recipe and corpus; only groups with the same one are compared."""
    runs: tuple[Run, ...]
    """Finished and diverged runs, one per seed."""
    unfinished: tuple[Run, ...]
    """Running, interrupted or failed runs, which have no result."""
    repeated: tuple[Run, ...]
    """Further runs of a seed that `runs` already contains."""
    drawn: tuple[Run, ...]
    """Runs whose curves are drawn: `runs`, and `unfinished` if a run with a result has their recipe."""
    is_baseline: bool = False
    """True for the group that `baseline=` names: all others are compared with it."""

    @property
    def tag(self) -> str:
        """The tag of its runs, or nothing."""
        return self.members[0].spec.get("tag") or ""

    @property
    def shown(self) -> Run | None:
        """The run whose heads are drawn: the first finished seed, else the first diverged one, else any."""
        return next((run for run in self.runs if run.status == "finished"), next(iter(self.drawn), None))

    @property
    def members(self) -> tuple[Run, ...]:
        """Its runs except repeated ones; those with a result come first."""
        return (*self.runs, *self.unfinished)

    @property
    def perplexities(self) -> dict[Hashable, float]:
        """Final perplexity by seed and data order; NaN for a diverged run."""
        return {_seed(run): run.perplexity for run in self.runs}


@dataclass(frozen=True)
class Part:
    """Groups that are shown together: those of one recipe, or all if the report does not mix recipes."""

    title: str
    """Its studies, with the settings that distinguish it from other parts of these studies; empty for the only part."""
    groups: list[Group]


def is_over(run: Run) -> bool:
    """True if a run finished or diverged, and so has a result."""
    return run.status in OVER


def group_runs(runs: Sequence[Run], *, mix: bool = False) -> list[Group]:
    """Group the runs of one variant, recipe and corpus; the paper's variants come first, in its order.

    Raises ValueError if runs with a result differ in corpus, precision or any other part of the recipe. With `mix`
    each recipe becomes a group whose name says how it differs.
    """
    if not runs:
        raise ValueError("no runs given: give a run folder or a folder of runs")
    over = [run for run in runs if is_over(run) and run.kind == "run"]
    differing = _differing(over)
    if differing and not mix:
        values = "; ".join(f"{key}: {_name_a_run_per_value(key, values, over)}" for key, values in differing.items())
        raise ValueError(
            f"these runs differ in their recipe ({values}): "
            "give runs of one recipe, or mix=true to show them side by side"
        )
    members: dict[Hashable, list[Run]] = {}
    for run in runs:
        folder = [str(run.folder)] if run.kind == "measurement" else []  # measurements are never seeds of each other
        members.setdefault((run.label, *folder, *sorted(_flat_spec(run).items())), []).append(run)
    with_result = [alike for alike in members.values() if any(map(is_over, alike))]
    without = [alike for alike in members.values() if not any(map(is_over, alike))]
    # Named separately, so that an unfinished run does not change the names of groups with a result.
    names = _names(with_result) + _names(with_result + without)[len(with_result) :]
    groups = [_group(name, alike) for name, alike in zip(names, with_result + without, strict=True)]
    recipes_with_result = {group.recipe for group in groups if group.runs}
    if recipes_with_result and not mix:  # the check above skipped unfinished runs
        groups = [group if group.recipe in recipes_with_result else replace(group, drawn=()) for group in groups]
    rank = {label: place for place, label in enumerate(published.ORDER)}
    return sorted(groups, key=lambda group: (rank.get(group.label, len(rank)), group.name))


def parts_of(runs: Sequence[Run], *, mix: bool = False, baseline: str = "") -> list[Part]:
    """One part for each recipe and one for measured models if `mix` and the runs have several recipes; else one part.

    `baseline`: the label, variant or name of the groups to compare all others with.

    Raises ValueError as `group_runs` does, and for a baseline that no run has.
    """
    groups = group_runs(runs, mix=mix)
    of_recipe: dict[str, list[Run]] = {}
    for group in groups:
        key = group.recipe if group.members[0].kind == "run" else "measured"
        of_recipe.setdefault(key, []).extend((*group.members, *group.repeated))
    parts = [Part("", groups)]
    if mix and len(of_recipe.keys() - {"measured"}) > 1:
        place = {run.folder: place for place, run in enumerate(runs)}
        ordered = sorted(of_recipe.values(), key=lambda alike: min(place[run.folder] for run in alike))
        parts = [
            Part(title, group_runs(alike, mix=True))
            for title, alike in zip(_part_titles(ordered), ordered, strict=True)
        ]
    if baseline:
        parts = [Part(part.title, [_marked(group, baseline) for group in part.groups]) for part in parts]
        every = [group for part in parts for group in part.groups]
        if not any(group.is_baseline for group in every):
            labels = ", ".join(dict.fromkeys(group.label for group in every))
            raise ValueError(f"baseline={baseline} is not among these runs; their variants are {labels}")
    return parts


def all_runs(groups: Sequence[Group]) -> list[Run]:
    """The members of every group."""
    return [run for group in groups for run in group.members]


def counterparts(group: Group, label: str, groups: Sequence[Group]) -> list[Group]:
    """Groups of `label` to compare `group` with: same recipe, a common seed, and the same tag if one of them has it."""
    same_recipe = [other for other in groups if (other.label, other.recipe) == (label, group.recipe)]
    common_seed = [other for other in same_recipe if other.perplexities.keys() & group.perplexities.keys()]
    return [other for other in common_seed if other.tag == group.tag] or common_seed


def perplexities_on_common_seeds(groups: Sequence[Group]) -> dict[str, Summary]:
    """Final perplexity of each group with a result, over the seeds that all of them have, else over its own.

    This way no group is ahead because of the seeds it happens to have. NaN if any seed of a group is.
    """
    of_group = {group.name: group.perplexities for group in groups if group.runs}
    common = set.intersection(*map(set, of_group.values())) if of_group else set()
    return {
        name: summarise([value for seed, value in values.items() if seed in common or not common or math.isnan(value)])
        for name, values in of_group.items()
    }


def recipes(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Differences between recipes, as `train.steps=40, train.precision=bf16`, each with the names of its groups.

    A single recipe has an empty text.
    """
    firsts = {group.name: group.members[0] for group in groups if group.members[0].kind == "run"}
    keys = _differing(list(firsts.values()))
    names: dict[str, list[str]] = {}
    for name, run in firsts.items():
        spec = _flat_spec(run, places=True)
        names.setdefault(", ".join(f"{key}={spec.get(key, 'unset')}" for key in keys), []).append(name)
    return names


def _part_titles(parts: Sequence[Sequence[Run]]) -> list[str]:
    studies = [", ".join(dict.fromkeys(run.spec["study"] for run in runs)) for runs in parts]
    titles = []
    for study, runs in zip(studies, parts, strict=True):
        alike = [others[0] for others, name in zip(parts, studies, strict=True) if name == study]
        spec = _flat_spec(runs[0], places=True)
        settings = [f"{key.split('.')[-1]}={spec.get(key, 'unset')}" for key in _differing(alike)]
        measured = runs[0].kind == "measurement"
        titles.append("Measured models" if measured else ": ".join(filter(None, (study, ", ".join(settings)))))
    return titles


def _marked(group: Group, baseline: str) -> Group:
    variant = group.members[0].spec.get("variant")
    return replace(group, is_baseline=baseline in (group.name, group.label, variant))


def _group(name: str, runs: list[Run]) -> Group:
    of_seed: dict[Hashable, Run] = {}
    over = sorted(filter(is_over, runs), key=_seed)
    for run in over:
        of_seed.setdefault(_seed(run), run)
    chosen, unfinished = tuple(of_seed.values()), tuple(run for run in runs if not is_over(run))
    return Group(
        name=name,
        label=runs[0].spec["label"],
        recipe=f"{recipe_of(runs[0].spec)}-{runs[0].corpus}",
        runs=chosen,
        unfinished=unfinished,
        repeated=tuple(run for run in over if run not in chosen),
        drawn=chosen + unfinished,
    )


def _seed(run: Run) -> tuple[int, int]:
    return run.seed, run.spec["data_seed"]


def _names(groups: list[list[Run]]) -> list[str]:
    """Each group's label, with the settings that distinguish it from groups of its label, and from groups of its tag.

    If a preset explains a setting, the preset is named instead.
    """
    firsts = [runs[0] for runs in groups]
    of_preset: dict[Hashable, list[Run]] = {}
    for run in firsts:
        of_preset.setdefault(run.spec.get("preset"), []).append(run)
    differ_within_a_preset = {key for runs in of_preset.values() for key in _differing(runs)}
    set_by_preset = _differing(firsts).keys() - differ_within_a_preset - {"preset", "corpus"}
    names = []
    for run in firsts:
        same_label = [other for other in firsts if other.label == run.label]
        same_tag = [other for other in firsts if other.spec.get("tag") == run.spec.get("tag")]
        spec = _flat_spec(run, places=True)
        keys = {*_differing(same_label, variants_too=True), *_differing(same_tag)} - set_by_preset
        settings = ", ".join(f"{key.split('.')[-1]}={spec.get(key, 'unset')}" for key in sorted(keys))
        names.append(f"{run.label} [{settings}]" if settings else run.label)
    return [
        f"{name} ({run.folder.name})" if run.kind == "measurement" and names.count(name) > 1 else name
        for run, name in zip(firsts, names, strict=True)
    ]


def _differing(runs: Iterable[Run], *, variants_too: bool = False) -> dict[str, list[str]]:
    """Recipe keys on which runs disagree, each with its values."""
    runs = list(runs)
    several_corpora = len({run.corpus for run in runs}) > 1
    specs = [_flat_spec(run, places=several_corpora) for run in runs]
    differing = {}
    for key in sorted({key for spec in specs for key in spec}):
        values = sorted({spec.get(key, "unset") for spec in specs})
        if len(values) > 1 and (variants_too or key not in VARIANT_FIELDS):
            differing[key] = values
    # The fingerprint adds nothing if every combination of data settings has its own corpus.
    data = [tuple(sorted(item for item in spec.items() if item[0].startswith("data."))) for spec in specs]
    if len(set(data)) == len({(settings, spec["corpus"]) for settings, spec in zip(data, specs, strict=True)}):
        differing.pop("corpus", None)
    return differing


def _name_a_run_per_value(key: str, values: Sequence[str], runs: Sequence[Run]) -> str:
    places = {_flat_spec(run, places=True).get(key, "unset"): run.place for run in reversed(runs)}
    return ", ".join(f"{value} in {places[value]}" for value in values)


def _flat_spec(run: Run, *, places: bool = False) -> dict[str, str]:
    """The recipe as `train.precision -> bf16`, with the corpus. `places`: also the paths of its text."""
    flat = {"corpus": run.corpus[:12]}
    left_out = {*NOT_RECIPE_FIELDS, *NOT_DECIDING} - (set(PLACES_OF_TEXT) if places else set())

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                visit(f"{prefix}.{key}" if prefix else key, item)
        elif prefix not in left_out:
            flat[prefix] = str(value)

    visit("", run.spec)
    return flat
