"""The folder in which a corpus is made before it has its name."""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from normfree.files import folder_lock

PREFIX = ".preparing-"
A_DAY = 24 * 3600.0
"""No preparation writes nothing for so long."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def free_room(folder: Path) -> str:
    """How much of the disk of a folder, which may not exist yet, is free, for messages."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    return f"{shutil.disk_usage(there).free / 1e9:.1f} GB are free (a quota may allow less)"


@contextmanager
def scratch_folder(corpora: Path) -> Iterator[Path]:
    """A folder in `corpora` that this process holds and that is gone afterwards."""
    corpora.mkdir(parents=True, exist_ok=True)
    _drop_abandoned(corpora)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=corpora) as scratch, folder_lock(Path(scratch)):
        yield Path(scratch)


def _drop_abandoned(corpora: Path) -> None:
    """Remove what processes that were killed while preparing left: folders that nobody locks and nobody writes to.

    A lock of another machine may not be seen from here (BeeGFS and Lustre can be set up so), but what it writes is.
    """
    for scratch in corpora.glob(f"{PREFIX}*"):
        with suppress(BlockingIOError, FileNotFoundError):
            newest = max(path.stat().st_mtime for path in (scratch, *scratch.rglob("*")))
            if time.time() - newest > A_DAY:
                with folder_lock(scratch):
                    shutil.rmtree(scratch, ignore_errors=True)  # NFS keeps the open lock file until it is let go
