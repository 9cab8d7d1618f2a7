"""Checkpoints that are whole or absent.

Trainer writes into a staging folder. Every file is then synced and hashed into a manifest, and the folder is renamed to
checkpoints/checkpoint-N. A resume takes the newest checkpoint that verifies; damaged ones are reported and set aside,
never deleted. Older checkpoints are deleted only after the new one verified.
"""

import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

from normfree.files import damages, make_readable, read_manifest, sync, write_manifest
from normfree.spec.run import RunSpec

STAGING = ".staging"
SET_ASIDE = "damaged"
SHARDS = "shards"
"""Folder of a checkpoint whose weights and optimiser states are in parts (train.sharding=fsdp)."""

logger = logging.getLogger("normfree")


class CheckpointError(OSError):
    """A checkpoint could not be written; older ones and the metrics are unchanged."""


def remove_leftovers(run: Path) -> None:
    """Remove half-written files of a killed process."""
    drop_staged(run / "checkpoints")
    for leftover in run.glob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def drop_staged(folder: Path) -> None:
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """List published checkpoints, newest first."""
    paths = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(paths, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def publish(folder: Path, step: int, facts: dict[str, Any], *, keep: int) -> Path:
    """Publish the staged checkpoint of `step`, verify it (else OSError), then delete all but the newest `keep`."""
    staged, published = folder / STAGING / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle, unsafe to load and never needed
    make_readable(staged)
    write_manifest(staged, {"step": step, **facts})
    if problems := damages(staged):
        raise OSError(f"checkpoint {step} is damaged on disk: {'; '.join(problems)}")
    staged.rename(published)
    sync(folder)
    (folder / STAGING).mkdir(exist_ok=True)
    for old in checkpoints_in(folder)[keep:]:  # moved first, so that a kill leaves no half of one among the sound ones
        shutil.rmtree(old.rename(folder / STAGING / old.name), ignore_errors=True)  # NFS may keep open files
    return published


def newest_sound(folder: Path, *, spec: RunSpec) -> Path | None:
    """Find the newest checkpoint that verifies and has this spec; log and move others to checkpoints/damaged/."""
    for checkpoint in checkpoints_in(folder):
        problems = problems_of(checkpoint, spec)
        if not problems:
            return checkpoint
        logger.warning("rejected %s: %s; moved to %s", checkpoint.name, "; ".join(problems), set_aside(checkpoint))
    return None


def problems_of(checkpoint: Path, spec: RunSpec | None) -> list[str]:
    """Why a run of this spec cannot resume here, one sentence each. Missing fields of an older spec have defaults."""
    if problems := damages(checkpoint):
        return problems
    try:
        same = spec is None or RunSpec.from_dict(read_manifest(checkpoint)["spec"]).identity() == spec.identity()
    except (KeyError, ValueError):
        same = False
    return [] if same else ["it belongs to a run with another spec"]


def check_sharding(checkpoint: Path, sharding: str) -> None:
    """Raise ValueError unless a run with this `train.sharding` can read the checkpoint."""
    in_parts = (checkpoint / SHARDS).is_dir()
    if in_parts != (sharding == "fsdp"):
        kind, key = ("in parts", "fsdp") if in_parts else ("whole", "none or ddp")
        advice = f"give train.sharding={key}, or tag=NAME for a run of its own"
        raise ValueError(
            f"{checkpoint} holds the model {kind}, and train.sharding={sharding} cannot resume it: {advice}"
        )


def compare_surroundings(checkpoint: Path, now: dict[str, Any]) -> None:
    """Warn of facts other than the checkpoint's, which may change numbers. Raises ValueError for another corpus."""
    then = read_manifest(checkpoint)
    old, new = then["corpus"][:12], now["corpus"][:12]
    if then["corpus"] != now["corpus"]:
        advice = "restore the old text, or give tag=NAME to train on the new one"
        raise ValueError(f"{checkpoint} was trained on corpus {old}, but the text now gives {new}: {advice}")
    changed = [f"{name} was {then[name]}, now {value}" for name, value in now.items() if then.get(name, value) != value]
    if changed:
        logger.warning("resuming %s in another environment, numbers may differ: %s", checkpoint, "; ".join(changed))


def set_aside(checkpoint: Path) -> Path:
    """Move a checkpoint to checkpoints/damaged/, under a free name."""
    folder = checkpoint.parent / SET_ASIDE
    folder.mkdir(exist_ok=True)
    names = itertools.chain([checkpoint.name], (f"{checkpoint.name}.{number}" for number in itertools.count(2)))
    return checkpoint.rename(next(folder / name for name in names if not (folder / name).exists()))
