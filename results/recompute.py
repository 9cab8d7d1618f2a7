"""The headline numbers again, from the records alone: `python results/recompute.py`.

It shares no code with the package, so that an error in the one is not an error in the other. It needs numpy and scipy.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy import stats

RESULTS = Path(__file__).parent
LINE = 0.75  # of the causal ceiling: heads above it are near uniform


def runs(study: str, label: str) -> dict[int, Path]:
    """Folders of the finished runs of a variant, by seed."""
    found = {}
    for file in sorted((RESULTS / study).glob("*/run.json")):
        facts = json.loads(file.read_text())
        if facts["status"] == "finished" and facts["spec"]["label"] == label and not facts["spec"]["tag"]:
            found[facts["spec"]["seed"]] = file.parent
    return found


def perplexity(run: Path) -> float:
    """exp of the mean loss over all held-out tokens."""
    return float(np.exp(json.loads((run / "run.json").read_text())["final"]["loss_nats"]))


def heads(run: Path) -> tuple[np.ndarray, int]:
    """Entropies in nats after training, [layers, heads], and the context."""
    context = json.loads((run / "run.json").read_text())["spec"]["data"]["context"]
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["split"] == "final" and entry["name"] == "entropy_nats":
            return np.array(entry["value"]), context
    raise ValueError(f"{run} has no entropies after training")


def near_uniform(run: Path) -> float:
    """Share of heads at or above `LINE` of the entropy of a uniform causal head, the mean of ln 1 to ln T."""
    entropy_LH, context = heads(run)
    return float((entropy_LH >= LINE * np.log(np.arange(1, context + 1)).mean()).mean())


def paired(study: str, ours: str, theirs: str, value, *, relative: bool) -> dict[str, float]:
    """Mean difference over common seeds with Student's 95 % interval, in percent, or percentage points."""
    a, b = runs(study, ours), runs(study, theirs)
    pairs = np.array([(value(a[seed]), value(b[seed])) for seed in a if seed in b])
    differences = 100 * (pairs[:, 0] - pairs[:, 1]) / (pairs[:, 1] if relative else 1)
    low, high = stats.t.interval(0.95, len(pairs) - 1, differences.mean(), stats.sem(differences))
    return {"mean": float(differences.mean()), "low": float(low), "high": float(high), "n": len(pairs)}


def headlines() -> dict[str, dict[str, float]]:
    """What README.md and docs/findings.md lead with."""
    numbers = {}
    for study in ("cpu", "cpu-lr1e-3", "cpu-pythia"):
        numbers[f"{study}: SM+R against SM+G"] = paired(study, "SM+R", "SM+G", perplexity, relative=True)
        points = paired(study, "SM+G", "SM+R", near_uniform, relative=False)
        numbers[f"{study}: near uniform, SM+G less SM+R"] = points
    for study in ("cpu", "cpu-lr1e-3"):
        numbers[f"{study}: SM+LN+R against SM+LN+G"] = paired(study, "SM+LN+R", "SM+LN+G", perplexity, relative=True)
        numbers[f"{study}: SM+G against SM+LN+G"] = paired(study, "SM+G", "SM+LN+G", perplexity, relative=True)
        for label in ("SM+G", "SM+R"):
            shares = [100 * near_uniform(run) for run in runs(study, label).values()]
            numbers[f"{study}: near uniform, {label}"] = {"mean": float(np.mean(shares)), "n": len(shares)}
    return numbers


if __name__ == "__main__":
    for name, values in headlines().items():
        print(f"{name:45}", *(f"{key} {value:.2f}" for key, value in values.items()), sep="  ")
