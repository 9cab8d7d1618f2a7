"""Progress of runs that are being trained, as lines for a terminal."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from normfree.files import LOCK_NAME, is_locked
from normfree.store.runs import METRICS_FILE, RUN_FILE, Run


def preparing_folders(folder: Path) -> list[Path]:
    """Folders of runs, and runs, in or below `folder` that a living process holds before there is a record."""
    locked = (lock.parent for lock in sorted(folder.rglob(LOCK_NAME)))
    return [place for place in locked if not (place / RUN_FILE).exists() and is_locked(place)]


def progress_lines(runs: Sequence[Run]) -> list[str]:
    """A `progress_line` for each run, with the states below each other."""
    width = max((len(run.place) for run in runs), default=0)
    return [progress_line(run, width) for run in runs]


def progress_line(run: Run, width: int) -> str:
    """Name, state, step, loss, speed, time left, age of the newest metrics, and the step of the last resume."""
    state, step, steps = run.state, run.steps_done, run.facts["steps"]
    parts = [f"{run.place:<{width}}  {state:<11}  step {step:>6} of {steps}"]
    if state == "finished":
        return f"{parts[0]}  {run.headline.name} {run.score:.2f}"
    if (loss := run.last("train", "loss")) is not None:
        parts.append(f"loss {loss:.3f} nats")
    if state == "running":
        if speed := run.last("train", "tokens_per_second"):
            parts.append(f"{speed:,.0f} tokens/s")
            if step == steps:
                parts.append("measuring the trained model")
            elif step:
                parts.append(f"{duration((steps - step) * run.tokens_seen / step / speed)} left")
        if (metrics := run.folder / METRICS_FILE).exists():
            parts.append(f"last line {duration(time.time() - metrics.stat().st_mtime)} ago")
    if (resumed_from := (run.facts.get("sessions") or [{"from_step": 0}])[-1]["from_step"]) > 0:
        parts.append(f"resumed at step {resumed_from}")
    if state in ("stopped", "interrupted", "failed"):
        parts.append("the same command resumes it")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Format seconds as `1 h 05 min`, `6 min 20 s` or `41 s`; `-` if they are not finite."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
