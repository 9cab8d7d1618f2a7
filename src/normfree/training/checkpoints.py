"""Checkpoints that are whole or absent.

Trainer writes into a staging folder. When it is done, every file is synced and hashed into a manifest, and the
folder is renamed to checkpoints/checkpoint-N. A resume takes the newest one that verifies; damaged ones are named
and set aside, never deleted. Rotation happens only after the new checkpoint verified.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from normfree.manifest import damages, read_manifest, sync_folder, write_manifest

STAGING = ".staging"
SET_ASIDE = "damaged"

logger = logging.getLogger("normfree")


def checkpoints_in(folder: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimiser step a checkpoint was taken after."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def publish(folder: Path, step: int, facts: dict[str, Any], *, keep: int) -> Path:
    """Turn the staged checkpoint of `step` into a published one, verify it, then drop all but the newest `keep`.

    Raises OSError when the files that were just written do not verify; older checkpoints are then untouched.
    """
    staged, published = folder / STAGING / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    write_manifest(staged, {"step": step, **facts})
    if found := damages(staged):
        raise OSError(f"checkpoint {step} did not reach the disk whole: {'; '.join(found)}")
    if published.exists():
        set_aside(published)
    staged.rename(published)
    sync_folder(folder)
    for old in checkpoints_in(folder)[keep:]:
        shutil.rmtree(old)
    return published


def newest_sound(folder: Path, *, identity: str) -> Path | None:
    """The newest checkpoint whose files match their manifest and whose run has this identity.

    Each one that is rejected on the way is named in a warning, with the reason, and moved to checkpoints/damaged/.
    """
    for checkpoint in checkpoints_in(folder):
        found = damages(checkpoint)
        if not found and read_manifest(checkpoint).get("identity") != identity:
            found = ["it belongs to a run with another spec"]
        if not found:
            return checkpoint
        place = set_aside(checkpoint)
        logger.warning("rejected %s: %s; set aside as %s", checkpoint.name, "; ".join(found), place)
    return None


def set_aside(checkpoint: Path) -> Path:
    """Move a checkpoint out of the way, under a name that is still free."""
    place = checkpoint.parent / SET_ASIDE / checkpoint.name
    number = 1
    while place.exists():
        number += 1
        place = place.with_name(f"{checkpoint.name}.{number}")
    place.parent.mkdir(exist_ok=True)
    checkpoint.rename(place)
    return place
