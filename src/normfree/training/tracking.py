"""Which run of a tracker a run of ours is. What Trainer's callbacks do not see to themselves."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from normfree.config import RunSpec
from normfree.manifest import fingerprint

logger = logging.getLogger("normfree")


@contextmanager
def wandb_run(spec: RunSpec, corpus: str, *, began: str, resumed: bool) -> Iterator[None]:
    """A run of wandb that a resume goes on with, and that ends here: Trainer would put whatever a process trains next,
    in a study or a sweep, into the run of the first.

    `corpus` is the fingerprint of its text; `began`, when its first process did, tells it from one that was begun anew;
    `resumed` says that an earlier process told of it, which syncing an offline resume may undo: it is warned of.
    WANDB_RUN_ID, WANDB_RESUME and WANDB_PROJECT say otherwise, and a run that the caller has opened is used and left
    open. Without wandb among the trackers nothing happens.
    """
    if "wandb" not in spec.train.trackers:
        yield
        return
    import wandb

    if wandb.run is not None:
        yield
        return
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "huggingface"),
        name=f"{spec.study}/{spec.name}",
        id=os.environ.get("WANDB_RUN_ID") or fingerprint([spec.identity(), corpus, began])[:16],
        resume=os.environ.get("WANDB_RESUME") or "allow",  # pyright: ignore[reportArgumentType]
    )
    if resumed and opened.offline:
        logger.warning(
            "wandb is offline: %s holds this resume alone, under the id of the run's earlier folder, and syncing one "
            "may replace the other on the server; metrics.jsonl has the whole run",
            opened.dir,
        )
    failed = True
    try:
        yield
        failed = False
    finally:
        try:
            opened.finish(exit_code=int(failed))
        except Exception as error:  # whatever became of the upload, the run is what its records say
            logger.warning("wandb did not end its run: %s", error)
