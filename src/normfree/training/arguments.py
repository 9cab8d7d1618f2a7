"""From a RunSpec to what Trainer, the model and the schedule need, with every check that needs the corpus."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from normfree.data import Corpus
from normfree.model import NormFreeConfig, activations, norms
from normfree.spec.run import RunSpec
from normfree.store.runs import OVER, RUN_FILE, DamagedRunError, read_run
from normfree.training.bf16 import needs_fp32_units
from normfree.training.process import refuse_other_products

logger = logging.getLogger("normfree")

DEVICES = Path("/dev")
COMPILES_NOTHING = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


def check_machine(spec: RunSpec, device: torch.device) -> None:
    """Raises ValueError when this device, or this number of processes, cannot train the spec as it stands."""
    train = spec.train
    refuse_other_products()
    # A torch for the CPU is taken at its word, but in a job that asked for a GPU.
    gpus = sorted(map(str, DEVICES.glob("nvidia[0-9]*"))) if torch.version.cuda else []
    gpus += [f"SLURM_JOB_GPUS={number}"] if (number := os.environ.get("SLURM_JOB_GPUS")) else []
    on_purpose = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if gpus and not on_purpose and not torch.cuda.is_available():  # a recipe of hours would train for weeks on the CPU
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ValueError(
            f"there is a GPU ({gpus[-1]}) that torch {torch.__version__}, {build}, cannot use: install a torch for "
            "the CUDA version that nvidia-smi names, or, to train on the CPU, put CUDA_VISIBLE_DEVICES=-1 before the "
            "command"
        )
    processes = PartialState().num_processes
    if processes == 1 and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:  # torchrun's
        raise ValueError(
            f"this process sees {torch.cuda.device_count()} GPUs, and one process trains on one: put "
            "CUDA_VISIBLE_DEVICES=0 before the command, or start it with torchrun (docs/training.md)"
        )
    share, rest = divmod(train.batch_sequences, processes)
    if rest or share % train.micro_batch_sequences:
        fitting = [size for size in range(1, min(share, train.micro_batch_sequences) + 1) if share % size == 0]
        unit = train.micro_batch_sequences * processes
        nearest = max(1, round(train.batch_sequences / unit)) * unit
        advice = f"another number of processes or train.batch_sequences={nearest}"
        raise ValueError(
            f"train.batch_sequences={train.batch_sequences} must be a multiple of train.micro_batch_sequences="
            f"{train.micro_batch_sequences} times the {processes} processes; give "
            f"{advice if rest else f'train.micro_batch_sequences={fitting[-1]}'}"
        )
    shared = ("train.evaluation_sequences", train.evaluation_sequences), ("probe.sequences", spec.probe.sequences)
    for key, count in (*shared, ("probe.final_sequences", spec.probe.final_sequences)):
        if count is not None and count < processes:
            raise ValueError(f"{key}={count} leaves some of the {processes} processes without one; give {processes}")
    if missing := [name for name in train.trackers if find_spec(name) is None]:
        raise ValueError(
            f"train.trackers={list(train.trackers)} needs {', '.join(missing)}, which is not installed: "
            "pip install -e '.[trackers]', or leave it out"
        )
    if train.precision == "fp16" and device.type == "cpu":
        raise ValueError("train.precision=fp16 needs a GPU; fp32 and bf16 work on the CPU")
    if train.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ValueError(
            "train.precision=bf16 needs a GPU with bf16 units (NVIDIA's from Ampere on), and this one would emulate "
            "them; give train.precision=fp16"
        )
    if train.compile and needs_fp32_units(train.precision, device):
        raise ValueError(
            "train.precision=bf16 with train.compile=true needs a processor with bf16 units, and this one has none; "
            "leave one of them out (compiled steps would take its slow bf16 kernels)"
        )
    if train.compile and (off := [name for name in COMPILES_NOTHING if os.environ.get(name) == "1"]):
        raise ValueError(
            f"train.compile=true, and {off[0]}=1 lets torch compile nothing: unset it, or leave the key out"
        )


def check_held_out(corpus: Corpus) -> None:
    """Raises ValueError when the held-out text has no block for some of the processes."""
    blocks, processes = len(corpus.validation), PartialState().num_processes
    if blocks < processes:
        raise ValueError(
            f"{blocks} held-out blocks leave some of the {processes} processes without one; give more text to hold out "
            f"(data.validation_documents, data.validation_paths) or start at most {blocks} processes"
        )


def with_less_memory(spec: RunSpec) -> str:
    """The keys that let a run of this spec go on with less memory, or advice where there are none left."""
    train = spec.train
    share = train.batch_sequences // PartialState().num_processes
    fitting = [size for size in range(1, train.micro_batch_sequences // 2 + 1) if share % size == 0]
    keys = [f"train.micro_batch_sequences={size}" for size in fitting[-1:]]
    if not train.gradient_checkpointing:
        keys.append("train.gradient_checkpointing=true")
    if not keys:
        return "nothing is left to save: take a GPU with more memory, or another run (a smaller data.context or model)"
    return f"the same command goes on with less, from the newest checkpoint, when {' or '.join(keys)} is added"


def training_arguments(spec: RunSpec, *, steps: int, output: Path) -> TrainingArguments:
    """Trainer's arguments for a spec that `check_machine` let pass."""
    train = spec.train
    on_cpu = not torch.cuda.is_available()
    per_pass = train.micro_batch_sequences * PartialState().num_processes
    falls = train.final_learning_rate < train.peak_learning_rate
    return TrainingArguments(
        output_dir=str(output),
        run_name=f"{spec.study}/{spec.name}",
        max_steps=steps,
        per_device_train_batch_size=train.micro_batch_sequences,
        gradient_accumulation_steps=train.batch_sequences // per_pass,
        activation_checkpointing=train.gradient_checkpointing,
        torch_compile=train.compile,
        learning_rate=train.peak_learning_rate,
        lr_scheduler_type="polynomial" if falls else "constant_with_warmup",
        lr_scheduler_kwargs={"power": 1.0, "lr_end": train.final_learning_rate} if falls else {},
        warmup_steps=min(round(train.warmup_share * steps), steps - 1),  # the schedule divides by what is left
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        max_grad_norm=train.max_gradient_norm,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        tf32=False,
        ddp_find_unused_parameters=False,  # there are none, and each step would look for them
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        seed=spec.seed,
        data_seed=spec.data_seed,
        ignore_data_skip=True,
        remove_unused_columns=False,
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=train.checkpoint_every,
        report_to=list(train.trackers) or "none",
    )


def is_done(folder: Path, spec: RunSpec, corpus: Corpus | None = None) -> bool:
    """True for a run that needs no work; one whose run.json is damaged does need it, and so does one whose text has
    another path, until its `corpus` is there.

    Raises ValueError where the folder holds another run.
    """
    if not (folder / RUN_FILE).exists():
        return False
    try:
        run = read_run(folder)
    except DamagedRunError:
        return False
    try:
        recorded = RunSpec.from_dict(run.spec)
    except ValueError as error:
        raise ValueError(
            f"{folder / RUN_FILE} holds a spec that this version cannot read ({error}): if it is damaged, move the "
            "file away to go on from the checkpoints; if another version wrote it, use that one or give tag=NAME"
        ) from None
    if recorded.identity() != spec.identity():
        replicate = replace(recorded, data_seed=spec.data_seed).identity() == spec.identity()
        name = "study=NAME (a tag would make it another row, not another replicate)" if replicate else "tag=NAME"
        raise ValueError(
            f"{folder} holds a run with another spec ({_differences(recorded.deciding(), spec.deciding())}); "
            f"give {name} or another runs_dir to keep both, or move that folder away"
        )
    there, here = ((one.data.paths, one.data.validation_paths) for one in (recorded, spec))
    if there != here:
        if corpus is None:
            return False
        if run.corpus != corpus.fingerprint:
            raise ValueError(
                f"{folder} holds a run on another text (corpus {run.corpus[:12]} there and {corpus.fingerprint[:12]} "
                "here); give tag=NAME or another runs_dir to keep both, or move that folder away"
            )
    return run.status in OVER


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    words = []
    for key in old | new:
        there, here = old.get(key), new.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            words.append(_differences(there, here, f"{prefix}{key}."))
        elif there != here:
            words.append(f"{prefix}{key} is {there} there and {here} here")
    return ", ".join(filter(None, words))


def total_steps(spec: RunSpec, corpus: Corpus) -> int:
    """Optimiser steps of the run. Raises ValueError for `train.steps` of more than one pass, and for too few epochs."""
    in_one_pass = len(corpus.train) // spec.train.batch_sequences
    if spec.train.epochs is not None:
        steps = int(spec.train.epochs * len(corpus.train) / spec.train.batch_sequences)
        if steps < 1:
            raise ValueError(
                f"train.epochs={spec.train.epochs} of {len(corpus.train)} training blocks do not fill one batch of "
                f"{spec.train.batch_sequences}; give more epochs, more text or a smaller train.batch_sequences"
            )
        return steps
    steps = spec.train.steps or 0
    if steps > in_one_pass:
        passes = math.ceil(100 * steps * spec.train.batch_sequences / len(corpus.train) + 1) / 100
        raise ValueError(
            f"train.steps={steps} needs {steps * spec.train.batch_sequences} blocks, but the corpus has "
            f"{len(corpus.train)} ({in_one_pass} steps); ask for fewer steps, give more text (data.max_bytes), or "
            f"say how often to repeat it: train.steps=null train.epochs={passes}"
        )
    return steps


def model_config(spec: RunSpec, corpus: Corpus) -> NormFreeConfig:
    """The model of a run on its corpus. Raises ValueError where the two do not fit each other."""
    tokenizer = corpus.tokenizer()
    fields = {
        "vocab_size": corpus.vocab_size,
        "max_position_embeddings": spec.data.context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **spec.model,
    }
    if fields["vocab_size"] < corpus.vocab_size:
        raise ValueError(
            f"model.vocab_size={fields['vocab_size']} is below the tokenizer's {corpus.vocab_size} pieces; leave it out"
        )
    if fields["max_position_embeddings"] < spec.data.context:
        raise ValueError(
            f"data.context={spec.data.context} is longer than model.max_position_embeddings="
            f"{fields['max_position_embeddings']} allows"
        )
    config = NormFreeConfig(**fields)
    _warn_of_code_left_behind(config)
    return config


def _warn_of_code_left_behind(config: NormFreeConfig) -> None:
    """A saved model takes the files of `normfree.model` along, not what another file puts into their tables."""
    used = (
        (activations, activations.ACTIVATIONS, set(config.layer_activations)),
        (norms, norms.NORMS, {config.norm, config.final_norm}),
    )
    for module, table, names in used:
        if left := sorted(name for name in names if table[name] is not module.IN_THIS_FILE.get(name)):
            logger.warning(
                "%s is not what %s has under that name, which goes with the saved model: RUN/model is this model only "
                "where the same code runs first (docs/extending.md)",
                ", ".join(left),
                module.__name__,
            )
