"""What the processes of one run wait for and agree on. With one process, nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import cast

import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from normfree.files import damages
from normfree.spec.run import RunSpec
from normfree.store.checkpoints import newest_sound

logger = logging.getLogger("normfree")

TEN_SECONDS = 10.0
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables from which Accelerate takes the number of processes."""


def state_of_processes(*, cpu: bool, timeout: timedelta) -> PartialState:
    """The state that all processes share; says after ten seconds who is awaited where."""
    told = {name: os.environ[name] for name in (*_COUNTS, "RANK", "LOCAL_RANK") if name in os.environ}
    place = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"
    advice = (
        f"the environment has {', '.join(f'{name}={value}' for name, value in told.items())}: start all processes with "
        f"torchrun, or, if this is to be the only one, unset {' '.join(told)}"
    )
    waiting = Timer(TEN_SECONDS, logger.warning, ("waiting at %s for the other processes; %s", place, advice))
    waiting.daemon = True
    waiting.start()
    try:
        return PartialState(cpu=cpu, timeout=timeout)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}" if told else str(error)) from error
    finally:
        waiting.cancel()


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
    if not first and (problems := damages(folder / name)):
        raise ValueError(
            f"{folder / name} is whole for the first process and not for this one ({'; '.join(problems)}): all "
            "processes must see one disk; start the same command again"
        )
    return folder / name
