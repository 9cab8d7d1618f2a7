"""Run folders with made-up but plausible numbers, written by `RunWriter`.

L layers, H heads
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from normfree.analysis.entropy import causal_ceiling
from normfree.spec.run import RunSpec
from normfree.store.runs import Run, RunWriter, read_run

NO_NORM, LEAKY = {"norm": "none"}, {"norm": "none", "activation": "leaky_relu"}
VARIANTS: dict[str, dict[str, Any]] = {
    "SM+LN+G": {"norm": "layernorm", "activation": "gelu"},
    "SM+LN+R": {"norm": "layernorm", "activation": "relu"},
    "SM+G": NO_NORM | {"activation": "gelu"},
    "SM+R": NO_NORM | {"activation": "relu"},
    "SM": NO_NORM | {"activation": "identity"},
    "SM+leaky, fixed": LEAKY | {"negative_slope": 0.1},
    "SM+leaky, per layer": LEAKY | {"learnable_slope": "per_layer"},
    "SM+leaky, shared": LEAKY | {"learnable_slope": "shared"},
    "SM+G/leaky": LEAKY | {"learnable_slope": "per_layer", "activation": ["gelu", "leaky_relu"] * 2},
    "SM+G/leaky, last": LEAKY | {"learnable_slope": "per_layer", "activation": ["gelu"] * 3 + ["leaky_relu"]},
}
PERPLEXITY = {"SM+LN+G": 34.2, "SM+LN+R": 34.9, "SM+G": 37.7, "SM+R": 36.1, "SM": 52.0}
CONTEXT = 32


def write_run(
    root: Path,
    label: str,
    *,
    seed: int = 0,
    status: str = "finished",
    shape: tuple[int, int] = (4, 4),
    steps: int = 200,
    perplexity: float | None = None,
    accuracy: float | None = None,
    broken_probe: bool = False,
    facts: dict[str, Any] | None = None,
    **spec: Any,
) -> Run:
    """Write a run folder under `root` and read it. `spec`: more fields of RunSpec; `facts`: more of run.json.

    `broken_probe`: in the last probe and at the end only the first layer is finite and has a ceiling, as when held-out
    text overflows.
    """
    built = _spec(label, seed, steps, spec)
    folder = root / built.study / built.name
    done = steps if status == "finished" else steps // 2 - (status == "diverged")  # without the step that diverged
    writer = RunWriter(folder, _facts(built, shape, done, facts or {}))
    _log_training(writer, label, shape, done, steps, seed, broken_probe=broken_probe)
    final = None
    if status == "finished":
        value = perplexity or PERPLEXITY.get(label, 36.8) * (1 + 0.01 * seed)
        loss = math.log(value)
        final = {"loss_nats": loss, "perplexity": value, "bits_per_byte": loss / 2.1, "tokens": 9000, "bytes": 27000}
        if accuracy is not None:
            final["accuracy"] = accuracy
            writer.log(steps, "validation", [("accuracy", accuracy)])
        entropy_LH = _entropy(label, shape, 1.0, seed)
        if broken_probe:
            entropy_LH[1:] = math.nan
        writer.log(steps, "final", _measured(entropy_LH, rows=1000))
    divergence = {"step": done + 1, "layer": 1, "module": "model.layers.1.attention", "kind": "activation"}
    divergence = divergence if status == "diverged" else None
    writer.update(status=status, final=final, divergence=divergence)
    return read_run(folder)


def study(root: Path) -> list[Run]:
    """Four variants, some with more seeds, one diverged, one interrupted, leaky ones of every kind."""
    runs = [write_run(root, "SM+LN+G", seed=seed) for seed in (0, 1)]
    runs += [write_run(root, "SM+LN+R", seed=0), write_run(root, "SM+LN+R", seed=1, status="interrupted")]
    runs += [write_run(root, "SM+G", seed=seed) for seed in (0, 1, 2)]
    runs += [write_run(root, "SM+R", seed=seed) for seed in (0, 1, 2)]
    runs += [write_run(root, "SM", seed=0), write_run(root, "SM", seed=1, status="diverged", broken_probe=True)]
    runs += [write_run(root, label) for label in VARIANTS if "leaky" in label]
    return runs


def another_corpus(fingerprint: str) -> dict[str, Any]:
    """`facts` of a run on another text."""
    return {"corpus": {"fingerprint": fingerprint, "unigram_perplexity": 300.0, "vocab_size": 2048}}


def rewritten(run: Run, metrics: str) -> Run:
    """The run with other metrics, recorded in its run.json."""
    (run.folder / "metrics.jsonl").write_text(metrics)
    RunWriter(run.folder, run.facts).update(status=run.status)
    return read_run(run.folder)


def _spec(label: str, seed: int, steps: int, more: dict[str, Any]) -> RunSpec:
    values: dict[str, Any] = {
        "study": "quick",
        "preset": "cpu",
        "variant": "".join(c if c.isalnum() else "-" for c in label.lower()),
        "label": label,
        "seed": seed,
        "model": {"num_hidden_layers": 4, **VARIANTS.get(label, {}), **more.pop("model", {})},
        "data": {"context": CONTEXT, **more.pop("data", {})},
        "train": {"steps": steps, "precision": "fp32", **more.pop("train", {})},
    }
    return RunSpec.from_dict({**values, **more})


def _facts(spec: RunSpec, shape: tuple[int, int], done: int, more: dict[str, Any]) -> dict[str, Any]:
    corpus = {"fingerprint": "c0ffee" * 10, "source": "installed", "context": CONTEXT, "vocab_size": 2048}
    corpus |= {"train_tokens": 2_000_000, "validation_tokens": 90_000, "unigram_perplexity": 402.5}
    names, slopes = spec.model.get("activation"), {}
    if isinstance(names, list):  # others have no record, like runs from before `train` made it
        slopes = {"slope_layers": [layer for layer, name in enumerate(names) if name == "leaky_relu"]}
    model = {"parameters": 1_234_567, "layers": shape[0], "heads": shape[1], "head_dim": 32, "hidden_size": 128}
    return {
        "spec": spec.to_dict(),
        "corpus": corpus,
        "model": model | slopes,
        "environment": {"normfree": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "processor": "x86", "cores": 2},
        "started": "2025-01-01T00:00:00",
        **{"steps": spec.train.steps, "steps_done": done, "tokens_seen": done * 4096, "wall_seconds": 95.0},
        "command": "normfree study quick",
        "study_note": "This scale is a demonstration, not evidence.",
        **more,
    }


def _log_training(
    writer: RunWriter, label: str, shape: tuple[int, int], done: int, steps: int, seed: int, *, broken_probe: bool
) -> None:
    for step in range(10, done + 1, 10):
        loss = 3.4 + 3.5 * math.exp(-step / 60) + 0.05 * math.sin(step + seed)
        writer.log(step, "train", [("loss", loss), ("tokens_per_second", 21000.0 + step)])
        if step % 50 == 0:
            writer.log(step, "validation", [("loss", loss + 0.1), ("perplexity", math.exp(loss + 0.1))])
    for step in range(0, done + 1, 20):
        entropy_LH = _entropy(label, shape, step / steps, seed)
        if broken_probe and step + 20 > done:
            entropy_LH[1:] = math.nan
        writer.log(step, "probe", [*_measured(entropy_LH, rows=64), *_slopes(label, step / steps)])


def _entropy(label: str, shape: tuple[int, int], progress: float, seed: int) -> np.ndarray:
    """From uniform towards what the paper shows: early layers stay high without LayerNorm."""
    layers = shape[0]
    ceiling = causal_ceiling(CONTEXT)
    depth_L1 = np.linspace(0, 1, layers)[:, None]
    noise_LH = np.random.default_rng(seed + 1).uniform(-0.08, 0.08, shape)
    share_LH = {"SM+G": 1.0 - 0.6 * depth_L1, "SM+R": 0.75 - 0.3 * depth_L1}.get(label, 0.55 + 0.15 * depth_L1)
    return ceiling * ((1 - progress) + progress * (share_LH + noise_LH).clip(0.02, 1.0))


def _measured(entropy_LH: np.ndarray, *, rows: int) -> list[tuple[str, Any]]:
    bad_LH = np.where(np.isnan(entropy_LH), rows, 0)
    return [
        ("entropy_nats", entropy_LH),
        ("nonfinite_rows", bad_LH),
        ("rows", np.full_like(bad_LH, rows)),
        ("ceiling_nats", np.where(np.isnan(entropy_LH).all(axis=1), math.nan, causal_ceiling(CONTEXT))),
    ]


def _slopes(label: str, progress: float) -> list[tuple[str, Any]]:
    learned = {"SM+leaky, per layer": 4, "SM+G/leaky": 2, "SM+G/leaky, last": 1}.get(label)
    if learned:
        return [("negative_slope", 0.01 + progress * np.linspace(0.2, -0.1, learned))]
    return [("negative_slope", [0.01 + 0.1 * progress])] if label == "SM+leaky, shared" else []
