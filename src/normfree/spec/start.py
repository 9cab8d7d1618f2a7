"""Where a run's weights come from: `start=random`, `start=run:FOLDER` or `start=model:NAME`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.files import describe_files, fingerprint
from normfree.spec.families import CLASSIFICATIONS
from normfree.spec.run import REMOVAL_FIELDS

MAY_CHANGE = ("embedding_dropout", "attention_dropout", "residual_dropout", "use_cache", "max_position_embeddings")
MAY_CHANGE += ("initializer_range", "residual_init", *REMOVAL_FIELDS)
"""Fields of the model that a run need not share with its start, besides the norms of `REMOVALS`."""
REMOVALS = {"fake": "layernorm", "taper": "rmsnorm"}
"""Norms that leave a trained model, and what they replace."""


@dataclass(frozen=True)
class Start:
    """Saved weights, and the settings that a run takes from them."""

    folder: Path
    """Of save_pretrained."""
    name: str
    """The same for all seeds of a run: study/variant-tag, or the model's name."""
    sha256: str
    """Of the files of weights."""
    settings: dict[str, Any]
    """Settings of a run by part, as in run.json: all of them, or `variant`, `label`, `model` and `data`."""

    def layers(self, groups: Mapping[str, Any], variant: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """What lies over a corpus and a preset: its settings, but for what `groups` choose, then another variant."""
        reads_text = self.settings["model"].get("family") != "vision"
        tokenizer = {"tokenizer": str(self.folder)} if reads_text else {}
        data = tokenizer if "data" in groups else self.settings["data"]
        own: dict[str, Any] = {"model": self.settings["model"], "data": data}
        if "preset" not in groups:
            own |= {part: self.settings[part] for part in ("train", "probe") if part in self.settings}
        own |= {"start_name": self.name, "start_sha256": self.sha256}
        if variant["variant"] == self.settings["variant"]:
            return [own, {name: self.settings[name] for name in ("variant", "label")}]
        return [own, variant]


def read_start(start: str) -> Start | None:
    """The start of that name, None for `random`. Raises ValueError for another form, and what cannot be begun with."""
    if start == "random":
        return None
    kind, _, place = start.partition(":")
    if kind not in ("run", "model") or not place:
        raise ValueError(f"start={start!r}; allowed: random, run:FOLDER, model:NAME")
    return _run(start, Path(place)) if kind == "run" else _model(start, place)


def _run(start: str, folder: Path) -> Start:
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"start={start}: {folder} is not a run folder, it has no run.json") from None
    if not (folder / "model" / "config.json").is_file():
        raise ValueError(f"start={start}: no model/ there, and the run is {facts['status']}; give a finished run")
    spec = facts["spec"]
    if spec["train"].get("objective") in CLASSIFICATIONS:
        raise ValueError(f"start={start}: a classifier has no head for tokens; give the run that it began with")
    folded = facts.get("folded") or {}
    settings = {part: spec[part] for part in ("preset", "variant", "label", "data", "train", "probe")}
    settings["model"] = {**spec["model"], **folded.get("model", {})}
    if folded:
        settings |= {"variant": spec["variant"].replace("-fake", ""), "label": spec["label"].replace("+FakeLN", "")}
    name = "/".join([spec["study"], "-".join(filter(None, [spec["variant"], spec["tag"]]))])
    return Start(folder / "model", name, _hash(start, folder / "model"), settings)


def _model(start: str, place: str) -> Start:
    from huggingface_hub import snapshot_download

    from normfree.model.conversion import fields_of

    if not (folder := Path(place)).is_dir():
        try:
            folder = Path(snapshot_download(place, allow_patterns=["*.safetensors", "*.json", "*.txt"]))
        except (OSError, ValueError) as error:
            reason = f"{type(error).__name__}: needs the network, or HF_HOME with a copy"
            raise ValueError(f"start={start}: no such folder, and the hub cannot give it ({reason})") from None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        fields = fields_of(config)
    except ValueError as error:
        raise ValueError(f"start={start}: {error}") from None
    data = {} if fields.get("family") == "vision" else {"tokenizer": str(folder)}
    settings = {"variant": "custom", "label": Path(place).name, "model": fields, "data": data}
    return Start(folder, place, _hash(start, folder), settings)


def _hash(start: str, folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"start={start}: {folder} has no *.safetensors file")
    return fingerprint(describe_files(folder, files))


def check_start(start: Start, fields: Mapping[str, Any]) -> None:
    """Raises ValueError for `fields`, those of a checked run, that differ from the start's and may not."""
    from normfree.model import NormFreeConfig

    old, new = NormFreeConfig(**start.settings["model"]), NormFreeConfig(**fields)
    old.activation, new.activation = old.layer_activations, new.layer_activations
    for name in NormFreeConfig.__annotations__:
        before, now = getattr(old, name, None), getattr(new, name, None)
        removes = name in ("norm", "final_norm") and now in REMOVALS and REMOVALS[now] == before
        if before != now and name not in MAY_CHANGE and not removes:
            hint = f"; norm={now} replaces {REMOVALS[now]}" if name == "norm" and now in REMOVALS else ""
            raise ValueError(f"model.{name}={now} differs from {before} of start={start.name} and cannot change{hint}")
