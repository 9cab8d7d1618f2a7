"""Training steps of the peers and ours, each behind one function: what benchmarks/training.py times.

A contender is built from a job (layers, width, vocabulary, context, batch) and runs whole steps: forward, backward,
clipping at 1.0, fused AdamW. Same model (GPT-2, all biases; `ours norm-free` is the paper's SM+R), same tokens, same
optimiser; only the way differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from normfree.model import NormFreeConfig, NormFreeForCausalLM
from normfree.training.precision import products_for

HEADS = {32: 2, 128: 4, 192: 6, 256: 8, 768: 12, 1024: 16}


@dataclass(frozen=True)
class Job:
    """One contender at one size."""

    contender: str
    layers: int
    width: int
    vocabulary: int
    context: int
    batch: int
    threads: int
    keep_memory: bool
    """Set glibc's allocator as our commands do."""
    processes: int = 1
    """Processes that share the sequences of a step and the threads."""
    rank: int = 0
    meeting: str = ""
    """File through which the processes find each other."""


def normfree_model(job: Job, *, norm: str, activation: str, bias: str) -> nn.Module:
    """Ours, in GPT-2's shape."""
    return NormFreeForCausalLM(
        NormFreeConfig(
            vocab_size=job.vocabulary,
            max_position_embeddings=job.context,
            num_hidden_layers=job.layers,
            num_attention_heads=HEADS[job.width],
            hidden_size=job.width,
            norm=norm,
            activation=activation,
            bias=bias,
        )
    )


def gpt2_model(job: Job, *, attention: str = "sdpa") -> nn.Module:
    """GPT2LMHeadModel without dropout."""
    config = GPT2Config(
        vocab_size=job.vocabulary,
        n_positions=job.context,
        n_layer=job.layers,
        n_head=HEADS[job.width],
        n_embd=job.width,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    config._attn_implementation = attention
    return GPT2LMHeadModel(config)


class PlainBlock(nn.Module):
    """A pre-norm GPT-2 block in a few lines, as small training repositories write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = HEADS[width]
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden_BTE: Tensor) -> Tensor:
        batch, tokens, width = hidden_BTE.shape
        parts = self.qkv(self.norm_1(hidden_BTE)).split(width, dim=-1)
        query, key, value = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden_BTE = hidden_BTE + self.mix(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return hidden_BTE + self.narrow(F.gelu(self.widen(self.norm_2(hidden_BTE))))


class PlainGPT(nn.Module):
    """A nanoGPT-style model: tied embeddings, biases as in GPT-2, all logits, cross-entropy in one call."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.tokens = nn.Embedding(job.vocabulary, job.width)
        self.places = nn.Embedding(job.context, job.width)
        self.blocks = nn.ModuleList(PlainBlock(job.width) for _ in range(job.layers))
        self.norm = nn.LayerNorm(job.width)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        hidden_BTE = self.tokens(ids_BT) + self.places.weight
        for block in self.blocks:
            hidden_BTE = block(hidden_BTE)
        logits_BTV = self.norm(hidden_BTE) @ self.tokens.weight.T
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


Loss = Callable[[Tensor], Tensor]


def ours(job: Job, *, norm: str = "layernorm", activation: str = "gelu", bias: str = "all") -> tuple[nn.Module, Loss]:
    """Our model, GPT-2 unless told otherwise, and the loss that our training asks it for."""
    model = normfree_model(job, norm=norm, activation=activation, bias=bias)
    return model, lambda ids: model(ids, labels=ids, return_logits=False).loss


def ours_in_processes(job: Job) -> tuple[nn.Module, Loss]:
    """Ours under DistributedDataParallel, as torchrun gives it: one thread a process, gradients averaged over gloo."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{job.meeting}", rank=job.rank, world_size=job.processes
    )
    model = normfree_model(job, norm="layernorm", activation="gelu", bias="all")
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model, lambda ids: wrapped(ids, labels=ids, return_logits=False).loss


def gpt2(job: Job) -> tuple[nn.Module, Loss]:
    """transformers' own loop."""
    model = gpt2_model(job)
    return model, lambda ids: model(ids, labels=ids).loss


def official(job: Job) -> tuple[nn.Module, Loss]:
    """Eager attention whose matrices are returned at every step, and their entropy."""
    model = gpt2_model(job, attention="eager")

    def loss(ids: Tensor) -> Tensor:
        output = model(ids, labels=ids, output_attentions=True)
        with torch.no_grad():
            [-(p * (p + 1e-9).log()).sum(-1).mean((0, 2)) for p in output.attentions]
        return output.loss

    return model, loss


def plain_gpt(job: Job, *, compiled: bool) -> tuple[nn.Module, Loss]:
    """The nanoGPT-style loop; targets are the ids themselves moved by one, one token short like everybody's."""
    model = PlainGPT(job)
    run = torch.compile(model) if compiled else model
    return model, lambda ids: run(ids, ids.roll(-1, 1))


CONTENDERS: dict[str, tuple[Callable[[Job], tuple[nn.Module, Loss]], bool]] = {
    "ours": (ours, True),
    "ours 2 processes": (ours_in_processes, True),
    "ours fp32": (ours, False),
    "ours norm-free": (lambda job: ours(job, norm="none", activation="relu", bias="qk"), True),
    "gpt2": (gpt2, False),
    "gpt2 bf16": (gpt2, True),
    "gpt2 official": (official, False),
    "nanogpt": (lambda job: plain_gpt(job, compiled=False), False),
    "nanogpt bf16": (lambda job: plain_gpt(job, compiled=False), True),
    "nanogpt bf16 compiled": (lambda job: plain_gpt(job, compiled=True), True),
}
"""Name -> (model and loss, whether under bf16 autocast)."""
TRAINER = "gpt2 Trainer"
NAMES = (*CONTENDERS, TRAINER)


def steps(job: Job) -> Iterator[nn.Module]:
    """An endless row of training steps; each `next` runs one and gives the model."""
    torch.manual_seed(0)
    build, in_bf16 = CONTENDERS[job.contender]
    ours_in_bf16 = in_bf16 and job.contender.startswith("ours")
    model, loss = build(job)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    while True:
        if job.processes > 1:
            torch.distributed.barrier()  # nobody runs ahead into somebody else's turn
        ids = torch.randint(0, job.vocabulary, (job.batch // job.processes, job.context))
        with products_for("bf16", torch.device("cpu")) if ours_in_bf16 else nullcontext():
            with torch.autocast("cpu", torch.bfloat16) if in_bf16 else nullcontext():
                value = loss(ids)
            value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield model


class WaitForTurn(TrainerCallback):
    """Lets Trainer take one step each time `turn` returns."""

    def __init__(self, turn: Callable[[nn.Module], None]) -> None:
        self.turn = turn

    def on_step_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.turn(model)


def train_with_trainer(job: Job, turn: Callable[[nn.Module], None]) -> None:
    """transformers' Trainer over GPT2LMHeadModel; `turn` is called before each step and may wait or raise."""
    torch.manual_seed(0)
    ids = torch.randint(0, job.vocabulary, (job.batch * 64, job.context))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=10_000,
        per_device_train_batch_size=job.batch,
        optim="adamw_torch_fused",
        logging_steps=10_000,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(gpt2_model(job), arguments, train_dataset=rows, callbacks=[WaitForTurn(turn)])
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
