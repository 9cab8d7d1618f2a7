"""What it costs to train runs: tokens, floating-point operations and, where that can be said, time."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from normfree.cost.counts import Matmul, count
from normfree.cost.families import NORMFREE_DEFAULTS, read_architecture
from normfree.spec.compose import Job
from normfree.spec.run import RunSpec
from normfree.store.progress import duration
from normfree.store.runs import read_run

H100_FLOPS, UTILISATION = 989e12, 0.4  # a second in bf16 without sparsity, and the share that we reckon with
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def config_of(spec: RunSpec) -> dict[str, Any]:
    """Fields of a run's model before its corpus is prepared, with GPT-2's vocabulary in place of a downloaded one."""
    vocab_size = NORMFREE_DEFAULTS["vocab_size"] if spec.data.tokenizer else spec.data.vocab_size
    if spec.model.get("family") == "vision":  # a patch in place of a vocabulary: as many products at each token
        vocab_size = spec.model.get("num_channels", 1) * spec.model.get("patch_size", 4) ** 2
    from_corpus = {"vocab_size": vocab_size, "max_position_embeddings": spec.data.context}
    return {"model_type": "normfree", **NORMFREE_DEFAULTS, **from_corpus, **spec.model}


def training_flops(spec: RunSpec, tokens: float) -> float:
    """FLOPs of training: 6 per token and weight of blocks and head, 12 x layers x width x T per token for attention.

    Gates of heads are left out; an encoder-decoder counts as a decoder of its size.
    """
    context, model = spec.data.context, config_of(spec)
    config = {name: model[name] for name in ("model_type", "max_position_embeddings", "feed_forward", *SIZES)}
    products = [each for each in count(read_architecture(config), context) if isinstance(each, Matmul)]
    return 6 * tokens / context * sum(each.elements * each.k for each in products if each.operation != "embedding")


def describe_training_cost(jobs: Sequence[Job], tokens_per_epoch: int | None = None) -> str:
    """Runs, tokens and operations in one line; GPU-hours for presets made for one; time left at a recorded speed."""
    tokens, flops, tokens_done, seconds = 0.0, 0.0, 0, 0.0
    for job in jobs:
        train = job.spec.train
        in_steps = (train.steps or 0) * train.batch_sequences * job.spec.data.context
        of_run = in_steps or (train.epochs or 0) * (tokens_per_epoch or 0)
        if not of_run:
            return f"{len(jobs)} runs; they count epochs, whose tokens are unknown until the corpus is prepared"
        tokens += of_run
        flops += training_flops(job.spec, of_run)
        with suppress(ValueError):  # no record, or a damaged one
            run = read_run(job.folder)
            seconds += run.facts.get("wall_seconds", 0.0) * run.has_result
            tokens_done += run.tokens_seen * run.has_result
    line = (
        f"{len(jobs)} runs, {tokens / 1e6:,.1f} M tokens, {flops:.1e} FLOPs of training (6 per token and weight "
        "without embeddings, 12 x layers x width x T per token for attention)"
    )
    if not jobs[0].spec.preset.startswith("cpu"):
        hours = flops / (UTILISATION * H100_FLOPS) / 3600
        line += f"; {hours:.2f} GPU-hours at {UTILISATION:.0%} of an H100's bf16 peak ({H100_FLOPS / 1e12:.0f} TFLOP/s)"
    if 0 < tokens_done < tokens:
        line += f"; about {duration((tokens / tokens_done - 1) * seconds)} left at recorded speed, one run at a time"
    return line
