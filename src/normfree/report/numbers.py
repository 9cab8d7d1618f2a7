"""The numbers behind the page as they were measured, for figures and statistics of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from normfree.analysis import shares_of_ceiling, trained_heads
from normfree.manifest import write_atomically
from normfree.records import Run, run_frame


def write_numbers(runs: Sequence[Run], output: Path) -> set[Path]:
    """Write `output`/numbers/runs.csv, one row a run, and heads.csv, one row a head; returns the paths."""
    kept = set()
    of_runs = run_frame(runs)
    of_runs.insert(0, "run", [run.place for run in runs])
    of_runs = of_runs.drop(columns="folder")  # says where a machine keeps it
    for name, frame in {"runs": of_runs, "heads": head_frame(runs)}.items():
        path = output / "numbers" / f"{name}.csv"
        write_atomically(path, frame.to_csv(index=False, na_rep="NaN", lineterminator="\n"))
        kept.add(path)
    return kept


def head_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """The entropy of every head (nats, and as a share of its causal ceiling) of runs that were measured after training.

    `run` is study/name; layers and heads count from 0. NaN is a head that is not finite.
    """
    rows = [
        {
            "run": run.place,
            "label": run.label,
            "seed": run.seed,
            "layer": layer,
            "head": head,
            "entropy_nats": nats,
            "share_of_ceiling": share,
        }
        for run in runs
        if (heads := trained_heads(run)) is not None
        for layer, shares_H in enumerate(shares_of_ceiling(heads).tolist())
        for head, (nats, share) in enumerate(zip(heads.entropy_LH[layer].tolist(), shares_H, strict=True))
    ]
    columns = ["run", "label", "seed", "layer", "head", "entropy_nats", "share_of_ceiling"]
    return pd.DataFrame(rows, columns=columns)
