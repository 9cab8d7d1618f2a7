"""Which runs may stand in one table, and which of them are seeds of the same thing."""

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
    """The variant in the paper's notation, and what tells it from its namesakes under mix=true."""
    label: str
    recipe: str
    """Fingerprint of recipe and corpus: groups are compared only where it is the same."""
    runs: tuple[Run, ...]
    """Finished and diverged runs, one a seed."""
    unfinished: tuple[Run, ...]
    """Running, interrupted or failed: they have no result."""
    repeated: tuple[Run, ...]
    """Runs of a seed that `runs` already has; they would pretend to be another seed."""
    drawn: tuple[Run, ...]
    """Runs whose curves are drawn: those with a result, then those without, if some result has their recipe."""

    @property
    def tag(self) -> str:
        """The tag that all its runs have, or nothing."""
        return self.members[0].spec.get("tag") or ""

    @property
    def shown(self) -> Run | None:
        """The run whose heads are drawn: the first seed that finished, else the first that diverged, else any."""
        return next((run for run in self.runs if run.status == "finished"), next(iter(self.drawn), None))

    @property
    def members(self) -> tuple[Run, ...]:
        """Its runs, those with a result first; repeated ones are left out."""
        return (*self.runs, *self.unfinished)

    @property
    def perplexities(self) -> dict[Hashable, float]:
        """Final perplexity by seed and order of the data; NaN for a diverged run."""
        return {_seed(run): run.perplexity for run in self.runs}


def is_over(run: Run) -> bool:
    """Whether a run has a result: it finished, or it diverged."""
    return run.status in OVER


def group_runs(runs: Sequence[Run], *, mix: bool = False) -> list[Group]:
    """Runs of one variant, recipe and corpus together, in the paper's order, then by name.

    Raises ValueError when runs with a result differ in corpus, precision or any other part of the recipe, unless
    `mix`: then recipes stand in rows of their own, named by what tells them apart.
    """
    if not runs:
        raise ValueError("no runs given: give a run folder or a folder of runs")
    over = [run for run in runs if is_over(run) and run.kind == "run"]
    differing = _differing(over)
    if differing and not mix:
        named = "; ".join(f"{key}: {_with_a_run_each(key, values, over)}" for key, values in differing.items())
        raise ValueError(
            f"these runs differ in their recipe ({named}): "
            "give runs of one recipe, or mix=true to show them side by side"
        )
    members: dict[Hashable, list[Run]] = {}
    for run in runs:
        own = [str(run.folder)] if run.kind == "measurement" else []  # one is never a replicate of another
        key = (run.label, *own, *sorted(_flat(run).items()))
        members.setdefault(key, []).append(run)
    with_result = [found for found in members.values() if any(map(is_over, found))]
    without = [found for found in members.values() if not any(map(is_over, found))]
    # Named apart, so that a run without a result changes no name of those that have one.
    names = _names(with_result) + _names(with_result + without)[len(with_result) :]
    groups = [_group(name, found) for name, found in zip(names, with_result + without, strict=True)]
    shown = {group.recipe for group in groups if group.runs}
    if shown and not mix:  # what is not finished was let in without a look at its recipe
        groups = [group if group.recipe in shown else replace(group, drawn=()) for group in groups]
    return sorted(groups, key=lambda group: (_rank(group.label), group.name))


def all_runs(groups: Sequence[Group]) -> list[Run]:
    """The runs of every group, those with a result first in each; repeated ones are left out."""
    return [run for group in groups for run in group.members]


def counterparts(group: Group, label: str, groups: Sequence[Group]) -> list[Group]:
    """The groups of `label` that `group` is compared with: of its recipe, with a seed in common, and where some of them
    have its tag, these alone."""
    alike = [other for other in groups if (other.label, other.recipe) == (label, group.recipe)]
    found = [other for other in alike if other.perplexities.keys() & group.perplexities.keys()]
    return [other for other in found if other.tag == group.tag] or found


def perplexities_on_common_seeds(groups: Sequence[Group]) -> dict[str, Summary]:
    """Final perplexity of each group with a result, by name, over the seeds that all of them have; over its own seeds
    where none is common.

    So no group is ahead by its draw of seeds. NaN where any seed of a group is.
    """
    of_group = {group.name: group.perplexities for group in groups if group.runs}
    common = set.intersection(*(set(found) for found in of_group.values())) if of_group else set()
    return {
        name: summarise([value for seed, value in found.items() if seed in common or not common or math.isnan(value)])
        for name, found in of_group.items()
    }


def recipes(groups: Sequence[Group]) -> dict[str, list[str]]:
    """What recipes differ in, `train.steps=40, train.peak_learning_rate=0.001`, to the names of their groups.

    Groups of one recipe give one empty text.
    """
    firsts = {group.name: group.members[0] for group in groups if group.members[0].kind == "run"}
    keys = _differing(list(firsts.values()))
    found: dict[str, list[str]] = {}
    for name, run in firsts.items():
        flat = _flat(run, places=True)
        found.setdefault(", ".join(f"{key}={flat.get(key, 'unset')}" for key in keys), []).append(name)
    return found


def _group(name: str, found: list[Run]) -> Group:
    chosen: dict[Hashable, Run] = {}
    over = sorted(filter(is_over, found), key=_seed)
    for run in over:
        chosen.setdefault(_seed(run), run)
    kept, unfinished = tuple(chosen.values()), tuple(run for run in found if not is_over(run))
    return Group(
        name=name,
        label=found[0].spec["label"],
        recipe=f"{recipe_of(found[0].spec)}-{found[0].corpus}",
        runs=kept,
        unfinished=unfinished,
        repeated=tuple(run for run in over if run not in kept),
        drawn=kept + unfinished,
    )


def _seed(run: Run) -> tuple[int, int]:
    return run.seed, run.spec.get("data_seed", 0)


def _rank(label: str) -> int:
    return published.ORDER.index(label) if label in published.ORDER else len(published.ORDER)


def _names(groups: list[list[Run]]) -> list[str]:
    """A name for each group: its label, what tells it from others of that label, and its recipe where its tag does not
    say that. A preset stands for what it sets."""
    firsts = [found[0] for found in groups]
    set_by_preset = _set_by_preset(firsts)
    names = []
    for found in groups:
        namesakes = [other for other in firsts if other.label == found[0].label]
        of_its_tag = [other for other in firsts if other.spec.get("tag") == found[0].spec.get("tag")]
        flat = _flat(found[0], places=True)
        keys = sorted({*_differing(namesakes, variants_too=True), *_differing(of_its_tag)})
        keys = [key for key in keys if key not in set_by_preset]
        extra = ", ".join(f"{key.split('.')[-1]}={flat.get(key, 'unset')}" for key in keys)
        names.append(f"{found[0].label} [{extra}]" if extra else found[0].label)
    apart = [run.kind == "measurement" and names.count(name) > 1 for run, name in zip(firsts, names, strict=True)]
    return [
        f"{name} ({run.folder.name})" if same else name for run, name, same in zip(firsts, names, apart, strict=True)
    ]


def _differing(runs: Iterable[Run], *, variants_too: bool = False) -> dict[str, list[str]]:
    """Recipe keys on which runs disagree, with the values met."""
    runs = list(runs)
    several = len({run.corpus for run in runs}) > 1
    flats = [_flat(run, places=several) for run in runs]
    keys = sorted({key for flat in flats for key in flat})
    found = {}
    for key in keys:
        values = sorted({flat.get(key, "unset") for flat in flats})
        if len(values) > 1 and (variants_too or key not in VARIANT_FIELDS):
            found[key] = values
    if "corpus" in found and _data_says_the_corpus(flats):
        del found["corpus"]
    return found


def _with_a_run_each(key: str, values: Sequence[str], runs: Sequence[Run]) -> str:
    of_value = {
        value: next(r.place for r in runs if _flat(r, places=True).get(key, "unset") == value) for value in values
    }
    return ", ".join(f"{value} in {place}" for value, place in of_value.items())


def _set_by_preset(runs: Sequence[Run]) -> set[str]:
    """Recipe keys on which runs of different presets disagree and runs of one preset never do."""
    of_preset: dict[Hashable, list[Run]] = {}
    for run in runs:
        of_preset.setdefault(run.spec.get("preset"), []).append(run)
    within = {key for found in of_preset.values() for key in _differing(found)}
    return _differing(runs).keys() - within - {"preset", "corpus"}


def _data_says_the_corpus(flats: Sequence[dict[str, str]]) -> bool:
    """Whether runs with the same settings of data met the same corpus, so that the settings tell corpora apart."""
    settings = [tuple(sorted(item for item in flat.items() if item[0].startswith("data."))) for flat in flats]
    return len(set(settings)) == len({(of_data, flat["corpus"]) for of_data, flat in zip(settings, flats, strict=True)})


def _flat(run: Run, *, places: bool = False) -> dict[str, str]:
    """The spec as `train.precision -> bf16`, without what names, places or watches a run, and the corpus it met.

    `places`: with the paths of its text, which say to a reader what a corpus is.
    """
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
