"""Progress of a run: its step, its speed, and if a process still trains it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from normfree.store.runs import METRICS_FILE, RUN_FILE, Run, find_runs


@dataclass(frozen=True)
class Progress:
    """A run's place in its training."""

    name: str
    """`study/name`."""
    state: str
    """running, stopped (no process holds the run), finished, diverged, interrupted or failed."""
    step: int
    steps: int
    loss_nats: float | None
    """Training loss of the newest line."""
    tokens_per_second: float | None
    """Of the newest line."""
    seconds_left: float | None
    """At that speed; None for a run that nobody trains."""
    seconds_since_line: float | None
    """Age of the newest line; None where none was written."""
    resumed_from: int
    """Step from which the newest session went on; 0 for a run that was never resumed."""
    perplexity: float
    """Final; NaN for a run without one."""


def progress_of(run: Run) -> Progress:
    """Read a run's progress. A run that is recorded as running is `stopped` unless a process holds its lock."""
    state, step, steps = run.state, run.steps_done, run.facts["steps"]
    speed = run.last("train", "tokens_per_second")
    tokens_per_step = run.tokens_seen / step if step else 0
    seconds_left = (steps - step) * tokens_per_step / speed if state == "running" and speed and step else None
    metrics = run.folder / METRICS_FILE
    age = datetime.now(UTC).timestamp() - metrics.stat().st_mtime if metrics.exists() else None
    sessions: list[dict[str, Any]] = run.facts.get("sessions") or [{"from_step": 0}]
    return Progress(
        name=run.place,
        state=state,
        step=step,
        steps=steps,
        loss_nats=run.last("train", "loss"),
        tokens_per_second=speed,
        seconds_left=seconds_left,
        seconds_since_line=age,
        resumed_from=sessions[-1]["from_step"],
        perplexity=run.perplexity,
    )


def find_progress(places: Iterable[Path | str]) -> list[Progress]:
    """Progress of every training run under the given folders, sorted by path.

    Raises ValueError for a place that does not exist or holds no training run.
    """
    places = list(places)
    runs = [run for run in find_runs(places) if run.kind == "run"]
    if not runs:
        raise ValueError(f"{', '.join(map(str, places))}: measured models, no training run with a {RUN_FILE}")
    return [progress_of(run) for run in runs]


def progress_line(progress: Progress, *, width: int = 0) -> str:
    """One line for a terminal: name, state, step, loss, speed, time left, and where it was resumed."""
    parts = [f"{progress.name:<{width}}  {progress.state:<11}  step {progress.step:>6} of {progress.steps}"]
    if progress.state == "finished":
        return f"{parts[0]}  perplexity {progress.perplexity:.2f}"
    if progress.loss_nats is not None:
        parts.append(f"loss {progress.loss_nats:.3f} nats")
    if progress.state == "running" and progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    if progress.state == "running" and progress.seconds_since_line is not None:
        parts.append(f"last line {duration(progress.seconds_since_line)} ago")
    if progress.resumed_from:
        parts.append(f"resumed at step {progress.resumed_from}")
    if progress.state in ("stopped", "interrupted", "failed"):
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
