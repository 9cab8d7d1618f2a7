"""What the processes of one run wait for and agree on. With one process, nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from normfree.config import RunSpec
from normfree.training.checkpoints import flaws, newest_sound


@contextmanager
def main_process_first(timeout: timedelta) -> Iterator[None]:
    """As PartialState's, with a timeout of its own: that of all other waiting suits steps, not preparations."""
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    waiting = cast(torch.distributed.ProcessGroup, torch.distributed.new_group(timeout=timeout, backend="gloo"))
    if not state.is_main_process:
        torch.distributed.barrier(waiting)
    yield
    if state.is_main_process:
        torch.distributed.barrier(waiting)


def of_the_first(found: bool) -> bool:
    """What the first process has found, in all of them: each looks at a disk that another command may be writing."""
    (agreed,) = broadcast_object_list([found])
    return agreed


def agreed_checkpoint(folder: Path, *, spec: RunSpec) -> Path | None:
    """The newest sound checkpoint that the first process finds, the same for all.

    Raises ValueError in a process that does not find it whole: its view of the disk is another.
    """
    first = PartialState().is_main_process
    found = newest_sound(folder, spec=spec) if first else None
    (name,) = broadcast_object_list([found.name if found else None])
    if name is None:
        return None
    if not first and (problems := flaws(folder / name)):
        raise ValueError(
            f"{folder / name} is whole for the first process and not for this one ({'; '.join(problems)}): all "
            "processes must see one disk; start the same command again"
        )
    return folder / name
