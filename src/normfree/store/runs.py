"""The run folder's schema: the only code that reads or writes run.json and metrics.jsonl.

A line of metrics.jsonl is `{"step": 100, "split": "probe", "name": "entropy_nats", "value": [[...], ...]}`.
Non-finite floats are the strings "NaN", "Infinity" and "-Infinity", so that every line is JSON and no
NaN becomes a number; readers get floats back.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from normfree.files import describe_files, is_locked, sync, write_atomically
from normfree.spec.families import Family, Score, family_of, score_of
from normfree.spec.run import recipe_of
from normfree.store.quantities import QUANTITIES, Quantity, read_description

RunFolder = str | os.PathLike[str]
"""A folder, or a Run, which stands for its folder."""
FORMAT = 1
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
STATUSES = ("running", "finished", "diverged", "interrupted", "failed")
OVER = ("finished", "diverged")
"""Statuses of a run that has a result."""

_COLUMNS = ["step", "split", "name", "value"]
_TEXT_OF = {math.inf: "Infinity", -math.inf: "-Infinity"}
_FLOAT_OF = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: Any) -> Any:
    """Make numbers, lists and dicts safe for JSON: non-finite floats become the strings NaN, Infinity, -Infinity."""
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return encode(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return _TEXT_OF.get(value, "NaN")
    return value


def decode(value: Any) -> Any:
    """Undo `encode`."""
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return _FLOAT_OF.get(value, value) if isinstance(value, str) else value


class DamagedRunError(ValueError):
    """run.json or metrics.jsonl exists but is damaged."""


@dataclass(frozen=True)
class Run:
    """The records of one run folder."""

    folder: Path
    facts: dict[str, Any]
    """The content of run.json."""

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        if self.kind == "measurement":
            return f"Run {self.folder}: a measurement of {self.label}"
        score = f"{self.headline.name} {self.score:.2f}"
        result = score if self.status == "finished" else f"step {self.steps_done}"
        return f"Run {self.folder}: {self.label}, seed {self.seed}, {self.status}, {result}"

    @property
    def spec(self) -> dict[str, Any]:
        return self.facts["spec"]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def place(self) -> str:
        """`study/name`: unique across studies."""
        return f"{self.spec['study']}/{self.name}"

    @property
    def label(self) -> str:
        """The variant in the paper's notation, followed by the run's tag."""
        tag = self.spec.get("tag")
        return f"{self.spec['label']} ({tag})" if tag else self.spec["label"]

    @property
    def seed(self) -> int:
        return self.spec["seed"]

    @property
    def kind(self) -> str:
        """`run` for a training run, `measurement` for a model measured once."""
        return self.facts.get("kind", "run")

    @property
    def status(self) -> str:
        return self.facts["status"]

    @property
    def has_result(self) -> bool:
        """True if the run finished or diverged."""
        return self.status in OVER

    @property
    def state(self) -> str:
        """`status`, or "stopped" for a run that is recorded as running and that no process holds: it was killed."""
        return "stopped" if self.status == "running" and not is_locked(self.folder) else self.status

    @property
    def corpus(self) -> str:
        """Fingerprint of the training corpus."""
        return self.facts["corpus"]["fingerprint"]

    @property
    def steps_done(self) -> int:
        """Optimiser steps on record. Metrics can be ahead of run.json, which is written with each checkpoint."""
        recorded = self.facts.get("steps_done", 0)
        return recorded if self.status in OVER else max([recorded, *self.metrics["step"].tolist()])

    @property
    def tokens_seen(self) -> int:
        return self.steps_done * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step, over all processes."""
        return self.spec["train"]["batch_sequences"] * self.spec["data"]["context"]

    @property
    def perplexity(self) -> float:
        """Final validation perplexity; NaN unless the run finished."""
        final = self.facts.get("final")
        return final["perplexity"] if self.status == "finished" and final else math.nan

    @property
    def family(self) -> Family:
        return family_of(self.spec)

    @property
    def headline(self) -> Score:
        """What its final evaluation is about."""
        return score_of(self.spec)

    @property
    def score(self) -> float:
        """Final headline: perplexity, or accuracy in percent; NaN unless the run finished."""
        final, score = self.facts.get("final"), self.headline
        return score.scale * final[score.name] if self.status == "finished" and final else math.nan

    @cached_property
    def quantities(self) -> dict[str, Quantity]:
        """Recorded quantities by name. Records without descriptions get today's."""
        descriptions = self.facts.get("quantities")
        if descriptions is None:
            return {name: QUANTITIES[name] for name in self.metrics["name"].unique() if name in QUANTITIES}
        return {name: read_description(name, values) for name, values in descriptions.items()}

    def layer_numbers(self, name: str, count: int) -> list[int | str]:
        """The `count` layers in which a quantity was measured: the model's numbers, or `encoder 0` of a group."""
        return (self.facts.get("quantities") or {}).get(name, {}).get("layers") or list(range(count))

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Columns step, split, name, value (a number or nested lists), in the order written.

        Raises DamagedRunError when the file does not match the hash recorded at the end of the run.
        """
        path = self.folder / METRICS_FILE
        if not self.metrics_match_record():
            advice = "restore it, or, if you edited it, remove metrics_file there"
            raise DamagedRunError(f"{path} does not match the sha256 in {RUN_FILE}: {advice}")
        return pd.DataFrame(read_lines(path), columns=_COLUMNS)

    def metrics_match_record(self) -> bool:
        """True if metrics.jsonl has the recorded sha256, or none was recorded because the run is not over."""
        path, recorded = self.folder / METRICS_FILE, self.facts.get("metrics_file")
        return not recorded or (path.exists() and describe_files(self.folder, [path])[METRICS_FILE] == recorded)

    def series(self, split: str, name: str) -> list[tuple[int, Any]]:
        """`[(step, value), ...]` of one metric."""
        return list(self._series.get((split, name), ()))

    @cached_property
    def _series(self) -> dict[tuple[str, str], list[tuple[int, Any]]]:
        series: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        for step, split, name, value in zip(*(self.metrics[column].tolist() for column in _COLUMNS), strict=True):
            series.setdefault((split, name), []).append((step, value))
        return series

    def last(self, split: str, name: str) -> Any | None:
        """The latest value of one metric, or None."""
        series = self.series(split, name)
        return series[-1][1] if series else None


def divergence_text(facts: Mapping[str, Any]) -> str:
    """Describe a recorded divergence: `non-finite loss at step 9, layer 1 (model.layers.1)`."""
    where = "outside the blocks" if facts.get("layer") is None else f"layer {facts['layer']}"
    return f"non-finite {facts['kind']} at step {facts['step']}, {where} ({facts['module']})"


def read_run(folder: RunFolder) -> Run:
    """Read a run folder. Raises ValueError for another folder or format, DamagedRunError (a ValueError) for damage."""
    folder = Path(folder)
    path, repair = folder / RUN_FILE, "restore it or move the folder away"
    try:
        facts = decode(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        reason = f"is not a run folder: it has no {RUN_FILE}" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {reason}; give the folder of one run") from None
    except ValueError:  # not JSON or not UTF-8
        raise DamagedRunError(f"{path} is not readable as JSON: {repair}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise DamagedRunError(f"{path} has no format: {repair}")
    if facts["format"] != FORMAT:
        raise ValueError(f"{path} has format {facts['format']}; this version reads format {FORMAT}: see CHANGELOG.md")
    if facts.get("status") not in STATUSES:
        raise DamagedRunError(f"{path} has no known status: {repair}")
    return Run(folder=folder, facts=facts)


def find_runs(folders: RunFolder | Iterable[RunFolder]) -> list[Run]:
    """Read every run under the given folder or folders, sorted by path. Raises ValueError for a folder without one."""
    runs: dict[Path, Run] = {}
    for folder in map(Path, [folders] if isinstance(folders, (str, os.PathLike)) else folders):
        if not folder.exists():
            raise ValueError(f"{folder} does not exist; give a run folder or a folder of runs")
        if not (files := sorted(folder.rglob(RUN_FILE))):
            raise ValueError(f"{folder} holds no run: no {RUN_FILE} in it or below it")
        for file in files:
            runs.setdefault(file.parent.resolve(), read_run(file.parent))
    return [runs[key] for key in sorted(runs)]


def load_runs(*folders: RunFolder, all_columns: bool = False) -> pd.DataFrame:
    """Read every run under the given folders into one table: a row a run, and the columns in which rows differ.

    Columns that repeat another are left out, and so are fingerprints. `all_columns` keeps every column of `run_frame`.
    """
    frame = run_frame(find_runs(folders))
    if all_columns:
        return frame
    texts = frame.drop(columns=["variant", "tag", "recipe", "corpus"]).astype(str)
    texts = texts.loc[:, texts.nunique() > 1]
    shown = {"folder", "label", "seed", "status", "perplexity", "accuracy", *texts.columns[~texts.T.duplicated()]}
    return frame.loc[:, [name for name in frame if name in shown]]


def run_frame(runs: Iterable[Run]) -> pd.DataFrame:
    """Build a table with one row per run: its outcome, then every setting under its key, e.g. `train.steps`."""
    rows = []
    for run in runs:
        spec, facts, final = run.spec, run.facts, run.facts.get("final") or {}
        row = {
            "folder": str(run.folder),
            "study": spec["study"],
            "variant": spec["variant"],
            "label": run.label,
            "tag": spec.get("tag", ""),
            "seed": run.seed,
            "data_seed": spec.get("data_seed", 0),
            "norm": spec["model"].get("norm", "layernorm"),
            "activation": spec["model"].get("activation", "gelu"),
            "peak_learning_rate": spec["train"].get("peak_learning_rate", math.nan),
            "steps": facts["steps"],
            "status": run.status,
            "diverged_at": (facts.get("divergence") or {}).get("step"),
            "perplexity": run.perplexity,
            "bits_per_byte": final.get("bits_per_byte", math.nan),
            "tokens_seen": run.tokens_seen,
            "wall_seconds": facts.get("wall_seconds", math.nan),
            "precision": spec["train"]["precision"],
            "recipe": recipe_of(spec),
            "corpus": run.corpus,
            "parameters": (facts.get("model") or {}).get("parameters"),
        }
        row |= {"accuracy": final["accuracy"]} if "accuracy" in final else {}
        parts = {part: spec.get(part, {}) for part in ("model", "data", "train", "probe")}
        rows.append(row | {f"{part}.{key}": value for part in parts for key, value in parts[part].items()})
    return pd.DataFrame(rows)


def read_lines(path: Path, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics file without a torn last one (of a kill). A missing file has none.

    The numbers of other damaged lines are added to `damaged`; without it they raise ValueError.
    """
    *whole, _torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, text in enumerate(whole, start=1):
        try:
            line = decode(json.loads(text))
        except ValueError:
            line = None
        if isinstance(line, dict) and line.keys() == set(_COLUMNS):
            yield line
        elif damaged is None:
            raise ValueError(f"{path} is damaged: line {number} is not a metric")
        else:
            damaged.append(number)


class RunWriter:
    """Writes the records of a run: run.json atomically, metrics.jsonl by appending."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = {"format": FORMAT, "status": "running", **facts}
        self.update()

    def update(self, **facts: Any) -> None:
        """Change facts of run.json. The end of a run also records the sha256 and size of its metrics."""
        metrics = self.folder / METRICS_FILE
        if facts.get("status") in OVER and metrics.exists():
            self.sync()  # a power cut must not take metrics whose hash is recorded
            facts["metrics_file"] = describe_files(self.folder, [metrics])[METRICS_FILE]
        self.facts |= facts
        write_atomically(self.folder / RUN_FILE, json.dumps(encode(self.facts), indent=1, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Make the metrics written so far survive a power cut."""
        sync(self.folder / METRICS_FILE)

    def log(self, step: int, split: str, values: Iterable[tuple[str, Any]]) -> None:
        """Append one line per metric. After an OSError (a full disk) the last may be torn, which readers leave out."""
        lines = [{"step": step, "split": split, "name": name, "value": encode(value)} for name, value in values]
        content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
        with (self.folder / METRICS_FILE).open("ab") as file:
            file.write(content)

    def forget_after(self, step: int) -> list[int]:
        """Drop what a resumed run measures again: later steps, the final measurement, a torn last line.

        Returns the numbers of damaged lines, which are dropped too; the old file is kept as metrics.jsonl.damaged.
        """
        path = self.folder / METRICS_FILE
        damaged: list[int] = []
        lines = list(read_lines(path, damaged))
        if damaged:
            write_atomically(path.with_name(f"{METRICS_FILE}.damaged"), path.read_bytes())
        earlier = [line for line in lines if line["step"] <= step and line["split"] != "final"]
        write_atomically(path, "".join(json.dumps(encode(line), allow_nan=False) + "\n" for line in earlier))
        return damaged
