"""Facts about where a run happens, for run.json and for what a resume has to compare."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState

import normfree
from normfree.data import Corpus
from normfree.files import describe_files, fingerprint
from normfree.model import modeling
from normfree.spec.run import RunSpec
from normfree.training.bf16 import has_bf16_units

_LIBRARIES = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, threads and the commit of the source, as far as each can be known."""
    return {
        "normfree": normfree.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
        "platform": platform.platform(),
        "processor": processor_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": has_bf16_units(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": device_name(device),
        "cuda": torch.version.cuda,
        "git_commit": git_commit(),
    }


def surroundings(spec: RunSpec, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """What numbers depend on beside a run's identity; a checkpoint's manifest holds it."""
    return {
        "corpus": corpus.fingerprint,
        "model_code": model_code(),
        "micro_batch_sequences": spec.train.micro_batch_sequences,
        "gradient_checkpointing": spec.train.gradient_checkpointing,
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
        "device": device_name(device),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": has_bf16_units(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def model_code() -> str:
    """A short fingerprint of the code that is saved with a model."""
    folder = Path(modeling.__file__).parent
    return fingerprint(describe_files(folder, sorted(folder.glob("*.py"))))[:12]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """The name of a GPU, else `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def whereabouts(precision: str, device: torch.device) -> str:
    """Where and how a run trains, for the log."""
    processes, threads = PartialState().num_processes, torch.get_num_threads()
    return (
        f"training on {device_name(device)}, {processes} process{'es' * (processes > 1)}, "
        f"{threads} thread{'s' * (threads > 1)} each, precision {precision}"
    )


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with "+changes" when files differ; None outside a checkout."""
    folder = Path(normfree.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, encoding="utf-8", timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--", ".") else commit


def command_line() -> str:
    """The command that was typed, as far as a process can know it."""
    program, *words = sys.argv
    start = ["normfree"] if program.endswith(("normfree", "normfree/__main__.py")) else [program]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        script = ["-m", "normfree"] if start == ["normfree"] else start
        start = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"], *script]
    return shlex.join([*start, *words])
