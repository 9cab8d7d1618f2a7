"""Checks and arguments that turn a RunSpec into a model, a schedule and a Trainer."""

import logging
import math
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from transformers import TrainingArguments

from normfree.cost.estimate import GIB, GPUS, check_memory, describe_estimate, find_gpu
from normfree.data import Corpus, ImageCorpus
from normfree.model import HEADS, NormFreeConfig
from normfree.model.configuration import NormFreeSeq2SeqConfig
from normfree.model.norms import check_removal
from normfree.model.spans import FIRST_SENTINEL, masked_and_spans
from normfree.spec.families import family_of
from normfree.spec.run import RunSpec
from normfree.store.runs import OVER, RUN_FILE, DamagedRunError, read_run
from normfree.training.precision import check_fp32_variables, needs_fp32_units
from normfree.training.sharding import check_can_shard

DEVICES = Path("/dev")
logger = logging.getLogger("normfree")


def check_machine(spec: RunSpec, device: torch.device) -> None:
    """Raise ValueError if this device or number of processes cannot train the spec."""
    train, processes = spec.train, PartialState().num_processes
    check_fp32_variables()
    chosen_cpu = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda and not chosen_cpu and not torch.cuda.is_available() and list(DEVICES.glob("nvidia[0-9]*")):
        advice = "install one for the CUDA version of nvidia-smi, or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU"
        raise ValueError(f"there is a GPU that torch, built for CUDA {torch.version.cuda}, cannot use: {advice}")
    if processes == 1 and (count := torch.cuda.device_count()) > 1 and "LOCAL_RANK" not in os.environ:  # of torchrun
        advice = "set CUDA_VISIBLE_DEVICES=0, or start it with torchrun (docs/training.md)"
        raise ValueError(f"this process sees {count} GPUs but trains on one: {advice}")
    batch, micro = train.batch_sequences, train.micro_batch_sequences
    if batch % (micro * processes):
        per_pass = f"train.micro_batch_sequences={micro} times the {processes} processes"
        raise ValueError(f"train.batch_sequences={batch} must be a multiple of {per_pass}")
    if train.sharding != "none" and processes == 1:
        advice = "start it with torchrun (docs/training.md), or leave the key out"
        raise ValueError(f"train.sharding={train.sharding} needs several processes, and this is 1: {advice}")
    if train.sharding == "fsdp":
        check_can_shard(spec)
    measured = {"probe.sequences": spec.probe.sequences, "probe.final_sequences": spec.probe.final_sequences}
    measured |= {"train.evaluation_sequences": train.evaluation_sequences or processes}
    for name, count in measured.items():
        if count < processes:
            raise ValueError(f"{name}={count} gives some of the {processes} processes nothing to measure: give more")
    if missing := [name for name in train.trackers if find_spec(name) is None]:
        raise ValueError(f"train.trackers needs {', '.join(missing)}, not installed: pip install -e '.[trackers]'")
    if train.precision == "fp16" and device.type == "cpu":
        raise ValueError("train.precision=fp16 needs a GPU; fp32 and bf16 work on the CPU")
    if train.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ValueError("train.precision=bf16 needs a GPU from Ampere on; this one would emulate it: give fp16")
    if train.compile == "cuda_graph" and device.type != "cuda":
        raise ValueError("train.compile=cuda_graph needs an NVIDIA GPU; train.compile=true compiles on this device too")
    if train.compile == "cuda_graph" and batch != micro:  # pytorch issues 169545 and 96693
        advice = f"give train.micro_batch_sequences={batch}, or train.compile=true"
        reason = "torch loses gradients that add up over passes"
        raise ValueError(f"train.compile=cuda_graph needs a step in one pass of one process, as {reason}: {advice}")
    if train.compile and needs_fp32_units(train.precision, device):
        raise ValueError("train.precision=bf16 with train.compile=true needs a processor with bf16 units; drop one")


def announce_needs(spec: RunSpec, corpus: Corpus, device: torch.device) -> None:
    """Log what a decoder needs of a GPU, in process 0. Raise ValueError if its memory is too small; silent on a CPU."""
    if device.type != "cuda" or not family_of(spec.to_dict()).causal:
        return
    state, facts = PartialState(), torch.cuda.get_device_properties(device)
    spec = replace(spec, model={"vocab_size": corpus.vocab_size, **spec.model})
    memory_gib, processes = facts.total_memory / GIB, state.num_processes
    if (key := find_gpu(facts.name)) and state.is_main_process:
        tokens = total_steps(spec, corpus) * spec.train.batch_sequences * spec.data.context
        gpu = replace(GPUS[key], memory_gib=round(memory_gib, 1))
        logger.info("%s", describe_estimate(spec, gpu, name=facts.name, processes=processes, tokens=tokens))
    check_memory(spec, memory_gib, name=facts.name, processes=processes)


def training_arguments(spec: RunSpec, *, steps: int, output: Path) -> TrainingArguments:
    """Trainer's arguments for a spec that passed `check_machine`."""
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
        torch_compile=bool(train.compile),
        torch_compile_mode="reduce-overhead" if train.compile == "cuda_graph" else None,
        learning_rate=train.peak_learning_rate,
        lr_scheduler_type="polynomial" if falls else "constant_with_warmup",
        lr_scheduler_kwargs={"power": 1.0, "lr_end": train.final_learning_rate} if falls else {},
        warmup_steps=min(round(train.warmup_share * steps), steps - 1),  # the schedule divides by the other steps
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        max_grad_norm=train.max_gradient_norm,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        tf32=False,
        ddp_find_unused_parameters=False,  # there are none, and each step would search for them
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        accelerator_config={"non_blocking": not on_cpu},  # else each batch waits for the steps before it
        seed=spec.seed,
        data_seed=spec.data_seed,
        ignore_data_skip=True,
        remove_unused_columns=False,
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=train.checkpoint_every,
        report_to=list(train.trackers) or "none",
        project="normfree",  # read by trackio
        disable_tqdm=True,  # `train` has a bar of its own; this also keeps transformers' table out of notebooks
    )


def is_done(folder: Path, spec: RunSpec, corpus: Corpus | None = None) -> bool:
    """True if the folder holds this run and it is over. Raises ValueError if it holds another run.

    Without `corpus` a run whose text or tokenizer has another path is not done; nor is one with a damaged run.json.
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
        advice = "move the file away to resume from the checkpoints, or give tag=NAME"
        problem = f"{folder / RUN_FILE} holds a spec that this version cannot read ({error})"
        raise ValueError(f"{problem}: {advice}") from None
    if recorded.identity() != spec.identity():
        old, new = (pd.json_normalize(each.deciding(), max_level=1).iloc[0].to_dict() for each in (recorded, spec))
        keys = [key for key in old | new if old.get(key) != new.get(key)]
        differences = ", ".join(f"{key} is {old.get(key)} there and {new.get(key)} here" for key in keys)
        advice = "to keep both, give tag=NAME, or study=NAME for another data_seed, or move that folder away"
        raise ValueError(f"{folder} holds a run with another spec ({differences}); {advice}")
    if recorded.places_of_text != spec.places_of_text:
        if corpus is None:
            return False
        if run.corpus != corpus.fingerprint:
            corpora = f"corpus {run.corpus[:12]}, not {corpus.fingerprint[:12]}"
            advice = "give tag=NAME or another runs_dir to keep both, or move that folder away"
            raise ValueError(f"{folder} holds a run on another text or tokenizer ({corpora}); {advice}")
    return run.status in OVER


def total_steps(spec: RunSpec, corpus: Corpus) -> int:
    """Compute the run's optimiser steps. Raises ValueError for too little text."""
    train, blocks = spec.train, len(corpus.train)
    if train.epochs is not None:
        steps = int(train.epochs * blocks / train.batch_sequences)
        if steps < 1:
            advice = "give more epochs, more text or a smaller train.batch_sequences"
            raise ValueError(f"train.epochs={train.epochs} of {blocks} training blocks do not fill one batch; {advice}")
        return steps
    steps = train.steps or 0
    if steps > blocks // train.batch_sequences:
        passes = math.ceil(100 * steps * train.batch_sequences / blocks + 1) / 100
        needed = f"train.steps={steps} needs {steps * train.batch_sequences} blocks, but the corpus has {blocks}"
        repeat = f"repeat it with train.steps=null train.epochs={passes}"
        raise ValueError(f"{needed}: give fewer steps, more text (data.max_bytes), or {repeat}")
    return steps


def model_config(spec: RunSpec, corpus: Corpus) -> NormFreeConfig:
    """Build the configuration of the run's model. Raises ValueError if it does not fit the corpus."""
    if isinstance(corpus, ImageCorpus):
        facts = corpus.facts()
        names = dict(enumerate(facts["classes"]))
        config = HEADS["vision"].config_class(**spec.model, id2label=names, label2id={v: k for k, v in names.items()})
        for name in ("image_size", "num_channels"):
            if (value := getattr(config, name)) != facts[name]:
                raise ValueError(f"the images have another {name}: give model.{name}={facts[name]}, not {value}")
        return config
    tokenizer, kind = corpus.tokenizer(), HEADS[spec.model.get("family", "decoder")].config_class
    needed, targets = corpus.vocab_size, corpus.facts().get("target_tokens")
    has_sentinels = kind is NormFreeSeq2SeqConfig and not targets
    if has_sentinels:
        first = tokenizer.get_vocab().get(FIRST_SENTINEL, needed)  # known to the tokenizer of a run to start with
        needed = max(needed, first + 1 + masked_and_spans(spec.data.context, kind(**spec.model))[1])
    fields = {
        "vocab_size": needed,
        "max_position_embeddings": spec.data.context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **spec.model,
    }
    vocabulary, positions = fields["vocab_size"], fields["max_position_embeddings"]
    if vocabulary < needed:
        raise ValueError(f"model.vocab_size={vocabulary} is below the {needed} tokens of this corpus; leave it out")
    if positions < spec.data.context:
        raise ValueError(f"data.context={spec.data.context} is longer than model.max_position_embeddings={positions}")
    if has_sentinels:
        fields["eos_token_id"] = vocabulary - 1  # the last sentinel ends a target
    if targets:
        end = tokenizer.eos_token_id
        fields = {"decoder_start_token_id": end, **fields, "eos_token_id": end, "target_tokens": targets}
    config = kind(**fields)
    check_removal(config, total_steps(spec, corpus))
    return config
