"""Facts about the machine and the code, for run.json and for comparison on a resume."""

import os
import platform
import re
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
from normfree.training.precision import has_bf16_units
from normfree.training.processes import training_device


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Collect versions, hardware and the git commit for run.json."""
    return {
        "normfree": normfree.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy")},
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cuda": torch.version.cuda,
        "git_commit": git_commit(),
        **_hardware(device),
    }


def surroundings(spec: RunSpec, corpus: Corpus) -> dict[str, Any]:
    """Collect what the numbers depend on besides the spec, for a checkpoint's manifest."""
    return {
        "corpus": corpus.fingerprint,
        "model_code": model_code(),
        "micro_batch_sequences": spec.train.micro_batch_sequences,
        "gradient_checkpointing": spec.train.gradient_checkpointing,
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        **_hardware(training_device()),
    }


def _hardware(device: torch.device) -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
        "device": device_name(device),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": has_bf16_units(),
    }


def model_code() -> str:
    """Return a short fingerprint of the model's source, which is saved with every model."""
    folder = Path(modeling.__file__).parent
    return fingerprint(describe_files(folder, sorted(folder.glob("*.py"))))[:12]


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def processor_name() -> str:
    """Return the processor's model name, or its architecture if the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the commit of this checkout, with "+changes" if files differ; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(normfree.__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails in an environment inside another repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> str:
    """Reconstruct the command line of this process, torchrun included."""
    program, *words = sys.argv
    start = ["normfree"] if program.endswith(("normfree", "normfree/__main__.py")) else [program]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        script = ["-m", "normfree"] if start == ["normfree"] else start
        start = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"], *script]
    return shlex.join([*start, *words])
