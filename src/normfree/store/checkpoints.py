"""Checkpoints that are whole or absent.

Trainer writes into a staging folder. Every file is then synced and hashed into a manifest, and the folder is renamed to
checkpoints/checkpoint-N. A resume takes the newest checkpoint that verifies; damaged ones are reported and set aside,
never deleted. Older checkpoints are deleted only after the new one verified.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from normfree.files import damages, read_manifest, sync, write_manifest
from normfree.spec.run import RunSpec

STAGING = ".staging"
SET_ASIDE = "damaged"
BYTES_PER_PARAMETER = 12
"""fp32 weights and Adam's two moments."""
SMALL_FILES_BYTES = 4 * 2**20
"""Upper bound for tokenizer, schedule, random state and manifest."""

logger = logging.getLogger("normfree")


class CheckpointError(OSError):
    """A checkpoint could not be written; older ones and the metrics are unchanged."""


def require_space(folder: Path, parameters: int, *, checkpoints: int) -> None:
    """Raise OSError unless the disk of `folder` has room for this many checkpoints of a model."""
    needed = checkpoints * (BYTES_PER_PARAMETER * parameters + SMALL_FILES_BYTES)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:,.0f} MiB free, but {checkpoints} more checkpoints need "
            f"{needed / 2**20:,.0f} MiB: free space or choose another runs_dir"
        )


def make_room(run: Path, parameters: int, *, keep: int) -> None:
    """Remove half-written files of a killed process and check the disk space for `keep` checkpoints and one more.

    Raises OSError when the disk is too small.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    drop_staged(folder)
    for leftover in run.glob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    require_space(folder, parameters, checkpoints=max(0, keep + 1 - len(checkpoints_in(folder))))


def drop_staged(folder: Path) -> None:
    """Remove an unfinished checkpoint."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """List published checkpoints, newest first."""
    paths = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(paths, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the number of optimiser steps taken before this checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def publish(folder: Path, step: int, facts: dict[str, Any], *, keep: int) -> Path:
    """Publish the staged checkpoint of `step`, verify it, then delete all but the newest `keep`.

    Raises OSError when the new files do not verify; older checkpoints are then unchanged.
    """
    staged, published = folder / STAGING / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle, unsafe to load and never needed
    write_manifest(staged, {"step": step, **facts})
    if problems := damages(staged):
        raise OSError(f"checkpoint {step} is damaged on disk: {'; '.join(problems)}")
    if published.exists():
        set_aside(published)
    staged.rename(published)
    sync(folder)
    for old in checkpoints_in(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)  # fails on NFS while another process has a file open
    return published


def newest_sound(folder: Path, *, spec: RunSpec) -> Path | None:
    """Find the newest checkpoint that verifies and belongs to this spec.

    Each rejected checkpoint is logged with the reason and moved to checkpoints/damaged/.
    """
    for checkpoint in checkpoints_in(folder):
        problems = damages(checkpoint)
        if not problems and not belongs_to(checkpoint, spec):
            problems = ["it belongs to a run with another spec"]
        if not problems:
            return checkpoint
        logger.warning("rejected %s: %s; moved to %s", checkpoint.name, "; ".join(problems), set_aside(checkpoint))
    return None


def belongs_to(checkpoint: Path, spec: RunSpec) -> bool:
    """True if the checkpoint's run has this spec. Fields missing in an older manifest count as their defaults."""
    try:
        return RunSpec.from_dict(read_manifest(checkpoint)["spec"]).identity() == spec.identity()
    except (KeyError, ValueError):
        return False


def compare_surroundings(checkpoint: Path, now: dict[str, Any]) -> None:
    """Warn when a resume may not be bit-identical: compare `now` with the same facts in the checkpoint's manifest.

    Facts missing in an older manifest are not compared. Raises ValueError when the corpus has changed.
    """
    then = read_manifest(checkpoint)
    if then["corpus"] != now["corpus"]:
        raise ValueError(
            f"{checkpoint} was trained on corpus {then['corpus'][:12]}, but the text now gives {now['corpus'][:12]}: "
            "restore the old text, or give tag=NAME to train on the new one"
        )
    changed = [f"{name} was {then[name]}, now {value}" for name, value in now.items() if then.get(name, value) != value]
    if changed:
        logger.warning("resuming %s in another environment, numbers may differ: %s", checkpoint, "; ".join(changed))


def set_aside(checkpoint: Path) -> Path:
    """Move a checkpoint to checkpoints/damaged/, under a free name."""
    folder = checkpoint.parent / SET_ASIDE
    folder.mkdir(exist_ok=True)
    place, number = folder / checkpoint.name, 1
    while place.exists():
        number += 1
        place = folder / f"{checkpoint.name}.{number}"
    checkpoint.rename(place)
    return place
