"""Where a corpus is made before it has its name, and what becomes of the places of processes that were killed there."""

from __future__ import annotations

import errno
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from normfree.manifest import folder_lock, host_of_lock

PREFIX = ".preparing-"
A_MINUTE = 60.0
THREE_DAYS = 3 * 24 * 3600.0
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
    """Remove what processes that were killed while preparing left: folders that nobody locks any more."""
    for scratch in corpora.glob(f"{PREFIX}*"):
        with suppress(BlockingIOError, FileNotFoundError):
            if _looks_abandoned(scratch):
                with folder_lock(scratch):
                    shutil.rmtree(scratch, ignore_errors=True)  # NFS keeps the open lock file until it is let go


def _looks_abandoned(scratch: Path) -> bool:
    """Whether a lock that can be had means that nobody works here.

    On this machine it does, but for a folder that begins and may not have its lock yet. A lock of another machine may
    not be seen from here (BeeGFS and Lustre can be set up so), but what its process writes is.
    """
    if host_of_lock(scratch) == socket.gethostname():
        return time.time() - scratch.stat().st_mtime > A_MINUTE
    newest = max(path.stat().st_mtime for path in (scratch, *scratch.rglob("*")))
    return time.time() - newest > THREE_DAYS
