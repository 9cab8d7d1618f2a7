"""What Trainer's callbacks for trackers leave to us: which run of wandb a resume goes on with."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from normfree.files import fingerprint
from normfree.spec.run import RunSpec

logger = logging.getLogger("normfree")


@contextmanager
def wandb_run(spec: RunSpec, corpus: str, *, began: str, resumed: bool) -> Iterator[None]:
    """Open the run's own wandb run, or go on with it, and end it: Trainer would put the next run of a study into it.

    Its id comes from the spec, the fingerprint `corpus` and the time at which the run `began`. WANDB_RUN_ID,
    WANDB_RESUME and WANDB_PROJECT are read, and a wandb run that the caller has opened is used and left open.
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
        except Exception as error:  # the run is what its records say
            logger.warning("wandb did not end its run: %s", error)
