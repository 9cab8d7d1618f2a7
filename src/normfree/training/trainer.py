"""A Trainer subclass with its own data order, optimisers and objectives, and a check of gradients before clipping."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from normfree.files import read_manifest
from normfree.measures import periods_of
from normfree.measures.gradients import block_gradient_norms
from normfree.model.modeling import NormFreePreTrainedModel
from normfree.store.checkpoints import CheckpointError
from normfree.training.guard import Divergence, NonFiniteError, UnreadSteps, earliest, locate
from normfree.training.optimizers import OPTIMIZERS, parameter_groups
from normfree.training.precision import use_fp32_products
from normfree.training.record import Record
from normfree.training.sharding import load_shards, save_shards, shard

MINIMUM_SCALE = 1e-4
"""Lowest scale of fp16's gradient scaler, which starts at 65,536 and halves with each overflow."""
RUNS_AHEAD = ("cuda",)
"""Devices that would idle if the host waited for them in every step."""
UNREAD_STEPS = 16
"""Steps after which the host waits at the latest: until then their batches stay in memory."""


class NormFreeTrainer(Trainer):
    """Trainer for one run.

    A step with a non-finite loss or gradient, or with gradients that overflow fp16 at any scale, never reaches the
    optimiser. It is skipped if `train.on_nonfinite` allows it; otherwise NonFiniteError is raised: at once, or on a GPU
    before the next log line, measurement or checkpoint.
    """

    def __init__(self, *, record: Record, model: NormFreePreTrainedModel, args: TrainingArguments, **rest: Any) -> None:
        manifest = read_manifest(record.checkpoint) if record.checkpoint else {}
        self.record, self.spec, self.network = record, record.spec, model
        self.start_step: int = manifest.get("step", 0)
        self.skipped = [Divergence(**facts) for facts in manifest.get("skipped_steps", [])]
        self._unlogged: dict[str, Any] | None = manifest.get("unlogged")
        self.objective = record.objective.to(args.device)
        self.objective.restore(manifest.get("objective", {}))
        self._next_token_loss: Tensor | None = None
        self._norm_sums: Tensor | None = None
        self._has_state = model.has_state
        self._batches_of_step: list[dict[str, Tensor]] = []
        self._loss_before_step = torch.zeros(())
        self._gradient_norm: Tensor | None = None
        self._unread: UnreadSteps | None = None
        measured_every = periods_of(self.spec.probe.measures, self.spec.probe.every_steps)
        self._gradients_every = measured_every.get("gradients")
        train = self.spec.train
        self._periods = {train.log_every, train.evaluate_every, train.checkpoint_every, *measured_every.values()}
        self.sharded = train.sharding == "fsdp"
        if self.sharded:
            shard(model, train.precision, args.device)
        super().__init__(model=model, args=args, **rest)
        self.is_distributed_loading_by_transformers = self.sharded  # Trainer then adds autocast, and no DDP
        self.add_callback(_Advance(self))
        use_fp32_products()  # TrainingArguments and Accelerate turn TF32 on when they compile

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        batch = self.spec.train.batch_sequences
        return BlockOrder(
            blocks=len(train_dataset if train_dataset is not None else self.train_dataset),  # pyright: ignore[reportArgumentType]
            sequences=self.args.max_steps * batch,
            seed=self.spec.data_seed,
            start=self.start_step * batch,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Give the loader a random generator of its own: its first draw would shift dropout masks after a resume."""
        loader = super().get_train_dataloader()
        for part in (loader, getattr(loader, "base_dataloader", loader)):
            part.generator = torch.Generator()
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.network, self.spec.train, self.objective)
            self.optimizer = OPTIMIZERS[self.spec.train.optimizer](self.network, groups, self.spec.train)
            # The host must know of each step whether it was finite: to skip it, or to advance other states.
            of_host = self.spec.train.skips_allowed, self.accelerator.scaler, self._has_state, self.objective.layers
            # torch's fused optimisers leave out a step whose `found_inf` is 1; this is GradScaler's own test
            leaves_out = getattr(self.optimizer, "_step_supports_amp_scaling", False)
            if self.args.device.type in RUNS_AHEAD and leaves_out and not any(of_host):
                self._unread = UnreadSteps(self.optimizer, self.args.device)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the objective's term to the loss, and collect the sums of norms whose state changes."""
        sigma_weight = self.spec.train.sigma_weight
        if self.objective.layers:
            inputs = {**inputs, "entropy_layers": self.objective.layers}
        if sigma_weight:
            inputs = {**inputs, "sigma_variance": True}
        loss, outputs = cast(Any, super().compute_loss(model, inputs, True, num_items_in_batch))
        if (sums := outputs.get("norm_sums")) is not None:
            self._norm_sums = sums.detach() if self._norm_sums is None else self._norm_sums + sums.detach()
        if self.objective.layers or sigma_weight:
            self._next_token_loss = loss.detach()
            share = len(inputs["labels"]) / self.spec.train.batch_sequences
            term = self.objective.term(outputs["head_entropies"], share) if self.objective.layers else 0.0
            if sigma_weight:
                term = term + sigma_weight * share * outputs["sigma_variance"]
            # Gradients are averaged over processes, and Trainer scales its loss for that too.
            loss = loss + term * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def advance(self, step: int) -> None:
        """Move the objective, and norms and linear maps that have state, to their state after this step."""
        if self.skipped and self.skipped[-1].step == step:
            return
        if self.objective.layers:
            self.objective.advance(step, self._sum_over_processes)
        if self._has_state:
            sums = None if self._norm_sums is None else self._sum_over_processes(self._norm_sums)
            self.network.advance(step, sums)
        self._norm_sums = None

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(values, "sum"))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self._unlogged is not None:
            self._tr_loss.add_(self._unlogged["loss_sum"])
            self._globalstep_last_logged = self._unlogged["since_step"]
            self._unlogged = None
        if not self._batches_of_step:
            self._loss_before_step = self._tr_loss.clone()
        self._batches_of_step.append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._next_token_loss is not None:  # the logged loss is that of the next token
            loss = self._next_token_loss
        if self.accelerator.sync_gradients:
            for parameter in self.objective.parameters():  # they are not in the model that averages its gradients
                if parameter.grad is not None:
                    parameter.grad = cast(Tensor, self.accelerator.reduce(parameter.grad, "mean"))
            step, is_finite = self.state.global_step + 1, self._is_finite(loss)
            scaler = self.accelerator.scaler
            overflows_at_any_scale = scaler is not None and scaler.get_scale() < MINIMUM_SCALE
            if self._unread is not None:
                self._unread.add(is_finite, self._batches_of_step)
                is_due = step in (1, self.state.max_steps) or any(step % every == 0 for every in self._periods)
                if is_due or len(self._unread) >= UNREAD_STEPS:
                    self._check_unread(step)
            elif overflows_at_any_scale or not is_finite:
                self._skip_or_stop(step, self._batches_of_step)
                loss = torch.zeros_like(loss)
            self._batches_of_step.clear()
        return loss

    def _check_unread(self, step: int) -> None:
        """Raise NonFiniteError if one of the unread steps, of which `step` is the last, was not finite."""
        if self._unread is None or (bad := self._unread.read()) is None:
            return
        steps_after, batches = bad
        self.network.zero_grad(set_to_none=True)
        for inputs in batches:  # on the weights of that step, for its gradients
            super().training_step(cast(nn.Module, self.model_wrapped), inputs)
        self._skip_or_stop(step - steps_after, batches)

    def _is_finite(self, loss: Tensor) -> Tensor:
        total = self._tr_loss + loss  # with the earlier micro-batches
        if self.accelerator.scaler is None:  # fp16's scaler expects infinite gradients and skips them itself
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            self._gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            total = total + self._gradient_norm
        return torch.isfinite(cast(Tensor, self.accelerator.reduce(total)))  # every process must take the same branch

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip, and leave norms of the blocks' gradients to the measure `gradients` in the steps where it is due."""
        step, every = self.state.global_step + 1, self._gradients_every
        is_due = every is not None and (step % every == 0 or step == self.state.max_steps)
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0  # fp16's gradients have it
        before_L = block_gradient_norms(self.network) / scale if is_due else None
        if (norm := self._gradient_norm) is None:
            norm = cast(Tensor, super()._clip_grad_norm(model))
        else:
            nn.utils.clip_grads_with_norm_(self.network.parameters(), self.args.max_grad_norm, norm)
        if before_L is not None:
            vars(self.network)["block_gradient_norms"] = before_L, block_gradient_norms(self.network)
        return norm

    def _skip_or_stop(self, step: int, batches: list[dict[str, Tensor]]) -> None:
        """Keep a step out of weights, Adam and the logged mean loss, or raise NonFiniteError."""
        here = locate(self.network, [self._prepare_inputs(batch) for batch in batches], step=step)
        divergence = earliest(gather_object([here]))  # each process has another part of the batch
        if len(self.skipped) >= self.spec.train.skips_allowed:
            raise NonFiniteError(divergence)
        if self.accelerator.scaler is None:
            self.network.zero_grad(set_to_none=True)  # AdamW ignores parameters without gradient, weight decay included
        else:  # gradients may be finite although the loss is not, and the scaler would take the step
            for gradient in (parameter.grad for parameter in self.network.parameters()):
                if gradient is not None:
                    gradient.fill_(math.inf)
        self._norm_sums = None
        self.objective.discard_step()
        self._tr_loss.copy_(self._loss_before_step)
        self._globalstep_last_logged += 1  # Trainer divides the sum of losses by the steps since then
        self.skipped.append(divergence)
        self.record.write_skip(self.skipped)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "grad_norm" in logs and self.skipped and self.skipped[-1].step == self.state.global_step:
            logs["grad_norm"] = math.nan  # this step had no gradient
        super().log(logs, start_time)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = self.network.all_tied_weights_keys  # saved once, under their shared tensor's name
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.sharded:  # else `shard` has done it
            super()._move_model_to_device(model, device)

    # Each micro-batch is reduced: whole gradients until the last would take 4 bytes a parameter.
    _defer_fsdp_gradient_reduction: Any = nullcontext

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.sharded:  # else `_save_optimizer_and_scheduler` saves both
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_shards(Path(output_dir), self.network, cast(Any, self.optimizer).optimizer)
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            load_shards(Path(resume_from_checkpoint), self.network)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        load_shards(Path(checkpoint), self.network, optimizer.optimizer)
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        self._check_unread(step)  # a signal saves at any step
        try:
            super()._save_checkpoint(model, trial)
            mean = cast(Tensor, self.accelerator.reduce(self._tr_loss, "mean"))
            unlogged = {"loss_sum": mean.item(), "since_step": self._globalstep_last_logged}
            self.record.publish_checkpoint(step, self.skipped, unlogged)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            advice = "remove the cause, often a full disk, and the same command resumes from the newest"
            message = f"saving the checkpoint of step {step} failed ({reason}); older ones are unchanged: {advice}"
            raise CheckpointError(message) from error


class _Advance(TrainerCallback):
    def __init__(self, trainer: NormFreeTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.advance(state.global_step + 1)


@dataclass(kw_only=True, eq=False)
class BlockOrder(Sampler[int]):
    """Samples training blocks for a whole run, in a new permutation for each pass.

    Position p of the run is element p mod N of the permutation of pass p div N, so a resume at any step computes one
    permutation. The length is that of the whole run even after a resume: Trainer derives its schedule from it.
    """

    blocks: int
    sequences: int
    seed: int
    start: int = 0

    def __len__(self) -> int:
        return self.sequences

    def __iter__(self) -> Iterator[int]:
        first_pass, last_pass = self.start // self.blocks, (self.sequences - 1) // self.blocks
        for number in range(first_pass, last_pass + 1):
            offset = number * self.blocks
            order = np.random.default_rng((self.seed, number)).permutation(self.blocks)
            yield from map(int, order[max(self.start - offset, 0) : self.sequences - offset])
