"""Compose a run: a preset, a corpus, a variant and `key=value` words become one dict, and that a checked RunSpec."""

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normfree.spec.families import FAMILIES, image_tokens
from normfree.spec.keys import describe_keys, fields_of_model, nearest
from normfree.spec.run import NOT_SET_ALONE, REMOVAL_FIELDS, RunSpec
from normfree.spec.start import REMOVALS, Start, check_start, read_start
from normfree.spec.variants import (
    CONF,
    MAIN,
    check_fields_are_read,
    check_label,
    model_fields,
    read_variant,
    read_yaml,
    spread_over_layers,
)

DEFAULTS: dict[str, Any] = yaml.safe_load((CONF / "defaults.yaml").read_text(encoding="utf-8"))
GROUPS = tuple(key for key in DEFAULTS if (CONF / key).is_dir())
"""Folders of `conf` from which a run takes one file each."""
NAMES = ("study", "tag")
"""Keys whose value is text, whatever it looks like: tag=1e-3."""
_FROM_CORPUS = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")
_WHOLE_OR_BRACKETED = re.compile(r"""(?:\[[^]]*\]|\{[^}]*\}|'[^']*'|"[^"]*"|[^,\[\]{}'"])+""")
_HINTS = {
    "lr": "did you mean train.peak_learning_rate?",
    "source": "use data=NAME, which also sets the packing of that source",
    "workers": "it is a key of `normfree study` and `normfree train -m`",
}
"""What to use for a key that other programs, or other commands of ours, have."""


@dataclass(frozen=True)
class Job:
    """A run to train, and what its numbers do not depend on."""

    spec: RunSpec
    runs_dir: Path = Path("runs")
    cache_dir: Path | None = None
    command: str | None = None
    """The command that trains it alone; None means the command line of the process."""
    note: str = ""
    """What its report says about its weight as evidence."""

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.spec.study / self.spec.name


def compose_run(words: Sequence[str] = ()) -> Job:
    """Compose one run from `key=value` words; the last value of a key wins. Raises ValueError as `compose` does."""
    return compose(read_words(words))


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """Values by dotted key from `key=value` words. Raises ValueError for another form, and for several values."""
    texts = _texts_by_key(words)
    for key, alternatives in texts.items():
        if len(alternatives) > 1:
            word = f"'{key}={','.join(alternatives)}'"
            raise ValueError(f"{word} has several values: `normfree train -m` trains one run for each")
    return {key: _read_value(key, text) for key, (text,) in texts.items()}


def compose_runs(words: Sequence[str]) -> list[Job]:
    """Compose one run for each combination of comma-separated values, as in `seed=0,1 variant=sm-r,sm-g`."""
    texts = _texts_by_key(words)
    jobs = []
    for combination in itertools.product(*texts.values()):
        chosen = dict(zip(texts, combination, strict=True))
        command = shlex.join(["normfree", "train", *(f"{key}={text}" for key, text in chosen.items())])
        jobs.append(compose({key: _read_value(key, text) for key, text in chosen.items()}, command=command))
    check_folders_differ(
        jobs,
        advice="put what differs into the tag, e.g. 'tag=lr${train.peak_learning_rate}', or, for orders of the data "
        "that count as seeds, into the study: 'study=order${data_seed}'",
    )
    return jobs


def compose(values: Mapping[str, Any], *, command: str | None = None) -> Job:
    """Compose one run from values by dotted key, e.g. `{"preset": "cpu", "train.steps": 10}`.

    Raises ValueError, with the nearest valid names, for an unknown key, preset, variant or value.
    """
    merged, start = _merge(values)
    runs_dir, cache_dir = merged.pop("runs_dir", "runs"), merged.pop("cache_dir", None)
    if not runs_dir:
        raise ValueError(f"runs_dir={runs_dir}: name a folder, e.g. runs_dir=runs")
    merged["model"] = model_fields(merged["model"], declared_by(merged["variant"]))
    _set_image_tokens(merged)
    if start is not None:
        check_start(start, merged["model"])
    spec = RunSpec.from_dict(merged)
    settings = ["start_name", *sorted(key for key in allowed_keys() if "." in key)]
    if unknown := [key for key in spec.compare_across if key not in settings]:
        raise ValueError(f"compare_across={unknown[0]} is no setting of a run; {nearest(unknown[0], settings)}")
    check_fields_are_read(spec)
    check_label(spec, {name: declared_by(name) for name in (spec.variant, *variants()) if name != "custom"})
    return Job(spec, Path(runs_dir), Path(cache_dir) if cache_dir else None, command)


def control_of(values: Mapping[str, Any], job: Job) -> Job | None:
    """The same start, data and steps without removing norms, from a run's `values`; None if `job` removes none."""
    if job.spec.start == "random" or job.spec.model.get("norm") not in REMOVALS:
        return None
    removed = ("variant", *(f"model.{field}" for field in ("norm", "final_norm", *REMOVAL_FIELDS)))
    return compose({key: value for key, value in values.items() if key not in removed})


def compose_unchecked(values: Mapping[str, Any]) -> RunSpec:
    """Compose a run as `compose` does, with the model's fields unchecked: their check loads torch."""
    merged, _ = _merge(values)
    model = merged["model"]
    model["activation"] = spread_over_layers(model["activation"], model["num_hidden_layers"])
    _set_image_tokens(merged)
    return RunSpec.from_dict({key: merged[key] for key in merged if key not in ("runs_dir", "cache_dir")})


def _set_image_tokens(merged: dict[str, Any]) -> None:
    """Set data.context to the tokens of an image. Raises ValueError if it is set to another number."""
    if merged["model"].get("family") == "vision":
        tokens = image_tokens(merged["model"])
        reads_images = merged["data"].get("source") in FAMILIES["vision"].sources  # RunSpec refuses others
        if reads_images and (context := merged["data"].get("context", tokens)) != tokens:
            raise ValueError(f"data.context={context}, but an image of this model has {tokens} tokens: leave it out")
        merged["data"]["context"] = tokens


def check_folders_differ(jobs: Iterable[Job], *, advice: str) -> None:
    """Raises ValueError, with `advice`, where two runs would share a folder."""
    counts = Counter(str(job.folder) for job in jobs)
    if shared := sorted(folder for folder, count in counts.items() if count > 1):
        raise ValueError(f"more than one run would be {', '.join(shared)}: {advice}")


def members(group: str) -> list[str]:
    """The files of a folder of `conf`, e.g. the presets."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def variants() -> list[str]:
    """Names that help shows: those with a file of their own, and the main ones that are composed of parts."""
    return [*MAIN, *members("variant")]


def declared_by(variant: str) -> dict[str, Any]:
    """The fields of the model that define a variant. The value of a slope does not: a tag tells such runs apart."""
    fields = read_variant(variant).get("model", {})
    return {key: value for key, value in fields.items() if key != "negative_slope"}


def describe_run() -> list[tuple[str, Any, str]]:
    """(key, its value in a run without words, its meaning) of every key that can be set, for --help."""
    rows = describe_keys(RunSpec)
    for name, kind, default, meaning in fields_of_model():
        if kind.startswith("Literal["):
            meaning += f" {kind.removeprefix('Literal')}".replace('"', "").replace(", ", " | ")
        rows[f"model.{name}"] = (None if name in _FROM_CORPUS else default.strip('"'), meaning)
    parts = {part: values for part, values in _merge({})[0].items() if isinstance(values, dict)}
    shown = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    rows = {key: row for key, row in rows.items() if key not in NOT_SET_ALONE}
    return [(key, shown.get(key, default), meaning) for key, (default, meaning) in rows.items()]


@cache
def allowed_keys() -> frozenset[str]:
    return frozenset([*GROUPS, "runs_dir", "cache_dir", *(key for key, _, _ in describe_run())])


def _texts_by_key(words: Sequence[str]) -> dict[str, list[str]]:
    """The values of each key as text: one, or several with commas between them, outside of brackets and quotes."""
    texts: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not of the form key=value")
        alternatives = _WHOLE_OR_BRACKETED.findall(text)
        texts[key] = alternatives if alternatives and ",".join(alternatives) == text else [text]
    return texts


def _read_value(key: str, text: str) -> Any:
    """A word's value as YAML reads it. Raises ValueError for text that is not YAML."""
    try:
        if key in GROUPS or key in NAMES:
            value = yaml.load(text, yaml.BaseLoader)
            return value if isinstance(value, str) else text
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # pyright: ignore
    except yaml.YAMLError:
        quoted = "['...','...']" if text.startswith("[") else "'...'"
        raise ValueError(f'cannot read {f"{key}={text}"!r}; quote special characters: "{key}={quoted}"') from None


def _merge(values: Mapping[str, Any]) -> tuple[dict[str, Any], Start | None]:
    """The corpus, then the preset over it, then the variant, then single values, with ${...} resolved; and the start.

    A start's settings come before the variant, and in place of a corpus and a preset that `values` do not name.
    """
    for key in values:
        if key not in allowed_keys():
            raise ValueError(f"unknown key {key!r}; {_advice_on_key(key)}")
    groups, known = {key: value for key, value in values.items() if key in GROUPS}, {**DEFAULTS, **values}
    # One start for all runs of a study: run:runs/quick/${variant}-seed${seed}
    start_of_run = re.sub(r"\$\{(variant|seed)\}", lambda name: str(known[name[1]]), str(values.get("start", "random")))
    start = read_start(start_of_run)
    of_start = start.settings if start else {}
    chosen = DEFAULTS | {key: of_start[key] for key in ("preset", "variant") if key in of_start} | groups
    presets = [_read_member("preset", chosen["preset"])]
    while "extends" in presets[0]:
        presets.insert(0, _read_member("preset", presets[0].pop("extends")))
    corpora = [preset.pop("corpus") for preset in presets if "corpus" in preset]
    corpus = values.get("data", corpora[-1] if corpora else DEFAULTS["data"])
    variant = read_variant(str(chosen["variant"]))
    own = start.layers(groups, variant) if start else [variant]
    try:
        # Names and seeds too, so that ${seed} in a tag resolves.
        names = {key: DEFAULTS[key] for key in DEFAULTS if key not in GROUPS}
        merged = OmegaConf.merge(names, {"data": _read_member("data", corpus)}, *presets, *own)
        for key, value in values.items():
            if key not in GROUPS:
                OmegaConf.update(merged, key, value, merge=False)
        container: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).strip().splitlines()[0]) from error
    return container, start


def _read_member(group: str, name: str) -> dict[str, Any]:
    if name not in members(group):
        raise ValueError(f"unknown {group} {name!r}; {nearest(str(name), members(group))}")
    return read_yaml(CONF / group / f"{name}.yaml")


def _advice_on_key(key: str) -> str:
    last = key.rpartition(".")[2]
    if last in _HINTS:
        return _HINTS[last]
    same = sorted(known for known in allowed_keys() if known.rpartition(".")[2] == last)
    hint = f"did you mean {' or '.join(same)}?" if same else nearest(key, sorted(allowed_keys()))
    return "`normfree train --help` lists all" if hint.startswith("allowed") else hint
