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

from normfree.files import damages, read_manifest, sync, write_manifest
from normfree.spec.run import RunSpec

STAGING = ".staging"
SET_ASIDE = "damaged"
BYTES_PER_PARAMETER = 12
"""fp32 weights and Adam's two moments."""
SMALL_FILES_BYTES = 4 * 2**20
"""Tokenizer, schedule, state of the random numbers, manifest: a generous round number."""

logger = logging.getLogger("normfree")


class CheckpointError(OSError):
    """A checkpoint could not be written; the older ones and the metrics are as they were."""

    def __init__(self, step: int, cause: Exception | str) -> None:
        self.step = step
        self.reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        super().__init__(
            f"the checkpoint of step {step} could not be written ({self.reason}); older ones are untouched. Once the "
            "cause is gone (often a full disk), the same command goes on from the newest"
        )

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[int, str]]:
        return type(self), (self.step, self.reason)


def checkpoint_bytes(parameters: int) -> int:
    """About how much one checkpoint of a model takes on disk."""
    return BYTES_PER_PARAMETER * parameters + SMALL_FILES_BYTES


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raises OSError when the disk of `folder`, which exists, has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:,.0f} MiB free, and {purpose} takes about {needed / 2**20:,.0f} MiB: "
            "make room, or choose another runs_dir"
        )


def make_room(run: Path, parameters: int, *, keep: int) -> None:
    """Drop what a killed process left half-written in a run folder; see that what will be written fits the disk.

    Raises OSError when it does not: there is always one checkpoint more than `keep` for a moment.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    drop_staged(folder)
    for leftover in run.glob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    more = keep + 1 - len(checkpoints_in(folder))
    if more > 0:
        require_space(folder, more * checkpoint_bytes(parameters), f"a run with {more} more checkpoints")


def drop_staged(folder: Path) -> None:
    """Remove a checkpoint that was not finished."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


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
    (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should have to trust
    write_manifest(staged, {"step": step, **facts})
    if found := damages(staged):
        raise OSError(f"checkpoint {step} did not reach the disk whole: {'; '.join(found)}")
    if published.exists():
        set_aside(published)
    staged.rename(published)
    sync(folder)
    for old in checkpoints_in(folder)[keep:]:
        try:
            shutil.rmtree(old)
        except OSError as error:  # on NFS, a file that somebody still reads
            logger.warning("%s could not be removed (%s)", old, error.strerror)
    return published


def newest_sound(folder: Path, *, spec: RunSpec) -> Path | None:
    """The newest checkpoint whose files match their manifest and whose run has this spec.

    Each one that is rejected on the way is named in a warning, with the reason, and moved to checkpoints/damaged/.
    """
    for checkpoint in checkpoints_in(folder):
        found = damages(checkpoint)
        if not found and not belongs_to(checkpoint, spec):
            found = ["it belongs to a run with another spec"]
        if not found:
            return checkpoint
        try:
            place = f"set aside as {set_aside(checkpoint)}"
        except OSError as error:
            place = f"it could not be moved away ({error.strerror})"
        logger.warning("rejected %s: %s; %s", checkpoint.name, "; ".join(found), place)
    return None


def belongs_to(checkpoint: Path, spec: RunSpec) -> bool:
    """Whether a checkpoint is of a run with this spec. A field that its manifest does not know had today's default."""
    try:
        return RunSpec.from_dict(read_manifest(checkpoint)["spec"]).identity() == spec.identity()
    except (KeyError, ValueError):  # from before manifests held the spec, or with a field that is gone
        return False


def compare_surroundings(checkpoint: Path, now: dict[str, Any]) -> None:
    """Warn where a resume cannot promise bit-identical numbers; `now` holds what the manifest recorded, as it is today.

    What an older manifest does not name is not compared. Raises ValueError when the text is another one.
    """
    then = read_manifest(checkpoint)
    if then["corpus"] != now["corpus"]:
        raise ValueError(
            f"{checkpoint} was trained on a corpus with fingerprint {then['corpus'][:12]}, and the text now gives "
            f"{now['corpus'][:12]}: bring the old text back, or give tag=NAME to train on the new one"
        )
    changed = [
        f"{name} was {then[name]} and is {value}" for name, value in now.items() if then.get(name, value) != value
    ]
    if changed:
        logger.warning("resuming %s in other surroundings, numbers may differ: %s", checkpoint, ", ".join(changed))


def set_aside(checkpoint: Path) -> Path:
    """Move a checkpoint out of the way, under a name that is still free."""
    place, number = checkpoint.parent / SET_ASIDE / checkpoint.name, 1
    while place.exists():
        number += 1
        place = place.with_name(f"{checkpoint.name}.{number}")
    place.parent.mkdir(exist_ok=True)
    checkpoint.rename(place)
    return place
